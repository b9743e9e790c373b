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
rebase("layout", title=heading)
%>
<img src="{{static_url("pita.svg")}}" alt="" width="200" height="200">
<h1>{{heading}}</h1>
% if status in (400, 403, 413, 503):
<p class="intro">{{message}}</p>
% end
% if "could not be confirmed" in message:
<p><a class="step" href="/">Look at the tally before you vote again</a></p>
% elif status == 503:
<p><a class="step" href="/">Try again in a few seconds</a></p>
% else:
<p><a class="step" href="/">Go to the cats</a></p>
% end
