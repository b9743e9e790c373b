<%
rebase("layout", heading="How the votes came in")
headings = {"hour": "Two days, hour by hour", "day": "A month, day by day"}
formats = {"hour": "%d %b, %H:%M", "day": "%d %b"}
%>
<h1>How the votes came in</h1>
% if outdated:
<p class="intro">The database is away: these are the last known votes.</p>
% end
% if not any(any(votes.values()) for began, votes in charts["day"]):
<p class="intro">There was no vote in the last 30 days.</p>
<p><a class="step" href="/">Cast the first</a></p>
% else:
<p class="intro">All times are UTC.</p>
%   for unit, periods in charts.items():
%     most = max([1, *(count for began, votes in periods for count in votes.values())])
%     height = 100 * len(candidates)
<section>
<h2>{{headings[unit]}}</h2>
<p class="ends"><span>{{", ".join(candidate.name for candidate in candidates.values())}}, from top to bottom</span> <span>at most {{"{:,}".format(most)}}</span></p>
<svg class="chart" viewBox="-.5 0 {{len(periods)}} {{height}}" preserveAspectRatio="none" role="img" aria-label="Votes per {{unit}}; the table has the numbers">
%     for number, cat in enumerate(candidates, start=1):
<path class="icing-{{number}}" data-bar="{{cat}}" d="
%       for place, (began, votes) in enumerate(periods):
M{{place}} {{100 * number}}V{{round(100 * number - 95 * votes[cat] / most, 2)}}
%       end
"/>
%     end
</svg>
<p class="ends"><span>{{periods[0][0].strftime(formats[unit])}}</span> <span>{{periods[-1][0].strftime(formats[unit])}}</span></p>
<details>
<summary>Votes per {{unit}} as a table</summary>
<table>
<thead><tr><th scope="col">{{unit.capitalize()}}</th>\\
%     for candidate in candidates.values():
<th scope="col">{{candidate.name}}</th>\\
%     end
</tr></thead>
<tbody>
%     for began, votes in reversed(periods):
<tr><th scope="row">{{began.strftime(formats[unit])}}</th>\\
%       for cat in candidates:
<td>{{"{:,}".format(votes[cat])}}</td>\\
%       end
</tr>
%     end
</tbody>
</table>
</details>
</section>
%   end
% end
