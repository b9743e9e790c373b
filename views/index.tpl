% rebase("layout", title="Vote: it's your civic duty")
<%
cats = {
    "Gummi": ("Fruit Gummi", "A black and white cat in a donut with pink icing, a gummi bear on top."),
    "Pita": ("Pita", "A ginger cat in a donut with chocolate icing, whipped cream on top."),
}
total = sum(votes.values())
shares = {cat: 100 * count / (total or 1) for cat, count in votes.items()}
%>
<h1>Vote: it's your civic duty</h1>
% if voted in cats:
<p class="intro" role="status" tabindex="-1" autofocus>Thank you! Your vote for <strong>{{cats[voted][0]}}</strong> counts.</p>
% else:
<p class="intro">Two cats dressed as donuts: which one do you like better?</p>
% end

<form method="post" action="/add">
% for cat, count in votes.items():
%   (name, description), share = cats[cat], shares[cat]
<div class="cat">
<button type="submit" name="vote" value="{{cat}}">
<img src="{{static_url(cat.lower() + ".svg")}}" alt="{{description}}" width="400" height="400">
<span>Vote for <strong>{{name}}</strong></span>
</button>
<p class="lead" data-lead="{{cat}}" {{"" if share > 50 else "hidden"}}>In the lead</p>
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
% for cat, share in shares.items():
<rect data-bar="{{cat}}" width="{{share}}%" height="100%"/>
% end
<line x1="50%" x2="50%" y2="100%"/>
</svg>
<p id="outdated" {{"" if outdated else "hidden"}}>The live count is interrupted: these are the last known votes.</p>
<script type="module" src="{{static_url("catvote.js")}}"></script>
