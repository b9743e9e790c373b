<%
rebase("layout", heading="How the votes came in")
headings = {"hour": "Two days, hour by hour", "day": "A month, day by day"}
formats = {"hour": "%d %b, %H:%M", "day": "%d %b"}
month_votes = sum(sum(votes.values()) for began, votes in charts["day"])
%>
<h1>How the votes came in</h1>
% if outdated:
<p class="intro">The history is interrupted: these are the last known votes.</p>
% end
% if month_votes == 0:
<p class="intro">There was no vote in the last 30 days.</p>
<p><a class="step" href="/">Cast the first</a></p>
% else:
<p class="intro">All times are UTC.</p>
%   for unit, periods in charts.items():
%     times = [began.strftime(formats[unit]) for began, votes in periods]
%     peaks = {cat: max(votes[cat] for began, votes in periods) for cat in candidates}
%     highest = max(peaks.values()) or 1
<section>
<h2>{{headings[unit]}}</h2>
%     for place, (cat, candidate) in enumerate(candidates.items(), start=1):
<figure class="icing-{{place}}">
<figcaption class="ends"><strong class="swatch">{{candidate.name}}</strong> <span>busiest {{unit}}: {{format(peaks[cat], ",")}}</span></figcaption>
<svg class="chart" viewBox="-.5 0 {{len(periods)}} 100" preserveAspectRatio="none" role="img" aria-label="Votes for {{candidate.name}} per {{unit}}; the table has the numbers">
<path data-bar="{{cat}}" d="
%       for column, (began, votes) in enumerate(periods):
%         height = 100 * votes[cat] / highest
M{{column}} 100v{{round(-height, 2)}}
%       end
"/>
</svg>
</figure>
%     end
<p class="ends"><span>{{times[0]}}</span> <span>{{times[-1]}}</span></p>
<details>
<summary>Votes per {{unit}} as a table</summary>
<table>
<thead><tr><th scope="col">{{unit.capitalize()}}</th>\\
%     for candidate in candidates.values():
<th scope="col">{{candidate.name}}</th>\\
%     end
</tr></thead>
<tbody>
%     for time, (began, votes) in reversed(list(zip(times, periods))):
<tr><th scope="row">{{time}}</th>\\
%       for cat in candidates:
<td>{{format(votes[cat], ",")}}</td>\\
%       end
</tr>
%     end
</tbody>
</table>
</details>
</section>
%   end
% end
