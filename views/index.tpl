<%
rebase("layout", heading=title)
total = sum(votes.values())
shares = {cat: 100 * count / (total or 1) for cat, count in votes.items()}
most = max(votes.values())
leaders = [cat for cat, count in votes.items() if count == most]

def percent(share):
    if 0 < share < 1:
        return "<1%"
    end
    if 99 < share < 100:
        return ">99%"
    end
    return format(share, ".0f") + "%"
end
%>
<h1>{{title}}</h1>
% if thanked:
<p class="intro" role="status" tabindex="-1" autofocus>Thank you! Your vote for <strong>{{thanked.name}}</strong> counts.</p>
% else:
<p class="intro">{{question}}</p>
% end

<form method="post" action="/add">
<div class="cats cats-{{len(candidates)}}">
% for place, (cat, candidate) in enumerate(candidates.items(), start=1):
%   count = votes[cat]
%   leads = leaders == [cat]
<div class="cat icing-{{place}}">
<button type="submit" name="vote" value="{{cat}}">
<img src="{{static_url(candidate.picture)}}" alt="{{candidate.description}}" width="400" height="400" draggable="false">
<span>Vote for <strong>{{candidate.name}}</strong></span>
</button>
<p class="lead" data-lead="{{cat}}" {{"" if leads else "hidden"}}>In the lead</p>
<p class="count"><strong data-votes="{{cat}}">{{format(count, ",")}}</strong> <span data-noun="{{cat}}">{{"vote" if count == 1 else "votes"}}</span></p>
<p class="share" data-share="{{cat}}">{{percent(shares[cat])}}</p>
</div>
% end
</div>
</form>

<svg class="bar" aria-hidden="true">
<pattern id="sprinkles" width="44" height="24" patternUnits="userSpaceOnUse"><rect width="44" height="24"/><path d="M4 5l6 3M20 15l6-3M36 4l-3 6M9 20l5-4M30 21l6 1"/></pattern>
% if total == 0:
<text x="50%" y="50%">No votes yet</text>
% end
% left = 0
% for place, (cat, share) in enumerate(shares.items(), start=1):
<rect class="icing-{{place}}" data-bar="{{cat}}" x="{{left}}%" width="{{share}}%" height="100%"/>
%   left += share
% end
<line x1="50%" x2="50%" y2="100%"/>
</svg>
<p id="outdated" {{"" if outdated else "hidden"}}>The live count is interrupted: these are the last known votes.</p>
<script type="module" src="{{static_url("catvote.js")}}"></script>
