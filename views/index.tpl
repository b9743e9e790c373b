<%
rebase("layout", heading=title)
total = sum(votes.values())
most = max(votes.values())
leaders = [cat for cat in votes if votes[cat] == most]
left = 0
%>
<h1>{{title}}</h1>
% if thanked:
<p class="intro" role="status" tabindex="-1" autofocus>Thank you! Your vote for <strong>{{thanked.name}}</strong> counts.</p>
% else:
<p class="intro">{{question}}</p>
% end

<form method="post" action="/add">
% for number, (cat, candidate) in enumerate(candidates.items(), start=1):
%   count = votes[cat]
%   share = 100 * count / (total or 1)
<div class="cat icing-{{number}}">
<button type="submit" name="vote" value="{{cat}}">
<img src="{{static_url(candidate.picture)}}" alt="{{candidate.description}}" width="400" height="400">
<span>Vote for <strong>{{candidate.name}}</strong></span>
</button>
<p class="lead" data-lead="{{cat}}" {{"" if leaders == [cat] else "hidden"}}>In the lead</p>
<p class="count"><strong data-votes="{{cat}}">{{"{:,}".format(count)}}</strong> <span data-noun="{{cat}}">{{"vote" if count == 1 else "votes"}}</span></p>
<p class="share" data-share="{{cat}}">{{"<1" if 0 < share < 1 else ">99" if 99 < share < 100 else "{:.0f}".format(share)}}%</p>
</div>
% end
</form>

<svg class="bar" aria-hidden="true">
<pattern id="sprinkles" width="44" height="24" patternUnits="userSpaceOnUse"><rect width="44" height="24"/><path d="M4 5l6 3M20 15l6-3M36 4l-3 6M9 20l5-4M30 21l6 1"/></pattern>
% if not total:
<text x="50%" y="50%">No votes yet</text>
% end
% for number, cat in enumerate(candidates, start=1):
%   share = 100 * votes[cat] / (total or 1)
<rect class="icing-{{number}}" data-bar="{{cat}}" x="{{left}}%" width="{{share}}%" height="100%"/>
%   left += share
% end
% for number in range(1, len(candidates)):
<line x1="{{100 * number / len(candidates)}}%" x2="{{100 * number / len(candidates)}}%" y2="100%"/>
% end
</svg>
<p id="outdated" {{"" if outdated else "hidden"}}>The live count is interrupted: these are the last known votes.</p>
<script type="module" src="{{static_url("catvote.js")}}"></script>
