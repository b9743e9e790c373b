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
*_, last = candidates.values()
uncertain = voting and trouble and trouble.name == "UNCERTAIN"
%>
<img src="{{static_url(last.picture)}}" alt="" width="200" height="200">
<h1>{{heading}}</h1>
% if trouble and trouble.name == "NOT_READY":
<p class="intro">Something is wrong with our database\\
% elif trouble:
<p class="intro">Our database does not answer\\
% elif status in (400, 403, 413):
<p class="intro">{{message}}</p>
% end
% if trouble:
{{": your vote could not be confirmed." if uncertain else ": your vote was not counted." if voting else "."}}</p>
% end
% if uncertain:
<p><a class="step" href="/">Look at the tally before you vote again</a></p>
% elif trouble:
<p><a class="step" href="/">Try again in a few seconds</a></p>
% else:
<p><a class="step" href="/">Back to the vote</a></p>
% end
