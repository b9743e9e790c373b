<%
headings = {
    400: "That vote did not work",
    403: "That vote came from elsewhere",
    404: "There is no such page",
    405: "It does not work that way",
    413: "That was too big for a vote",
    503: "The bakery is closed for a moment",
}
heading = headings.get(status, "Something got burnt")
rebase("layout", heading=heading)
last = list(candidates.values())[-1]

step = "Back to the vote"
if trouble:
    ready = trouble.name != "NOT_READY"
    cause = "Our database does not answer" if ready else "Something is wrong with our database"
    step = "Try again in a few seconds"
end
uncertain = voting and trouble and trouble.name == "UNCERTAIN"
if uncertain:
    step = "Look at the tally before you vote again"
end
%>
<img src="{{static_url(last.picture)}}" alt="" width="200" height="200">
<h1>{{heading}}</h1>
% if uncertain:
<p class="intro">{{cause}}: your vote could not be confirmed.</p>
% elif trouble and voting:
<p class="intro">{{cause}}: your vote was not counted.</p>
% elif trouble:
<p class="intro">{{cause}}.</p>
% elif status in (400, 403, 413):
<p class="intro">{{message}}</p>
% end
<p><a class="step" href="/">{{step}}</a></p>
