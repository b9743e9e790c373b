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

if trouble is None:
    cause = "Something went wrong here"
elif trouble.name == "NOT_READY":
    cause = "Something is wrong with our database"
else:
    cause = "We had no answer from our database in time"
end
uncertain = trouble is None or trouble.name == "UNCERTAIN"
%>
<img src="{{static_url(last.picture)}}" alt="" width="200" height="200">
<h1>{{heading}}</h1>
% if status < 500:
%   step = "Back to the vote"
%   if status in (400, 403, 413):
<p class="intro">{{message}}</p>
%   end
% elif not voting:
%   step = "Try again in a few seconds"
<p class="intro">{{cause}}.</p>
% elif uncertain:
%   step = "Look at the tally before you vote again"
<p class="intro">{{cause}}: your vote could not be confirmed. It may have been counted.</p>
% else:
%   step = "Vote again in a few seconds"
<p class="intro">{{cause}}: your vote was not counted.</p>
% end
<p><a class="step" href="/">{{step}}</a></p>
