% rebase("layout", title="How the votes came in")
<h1>How the votes came in</h1>
% if outdated:
<p class="intro">The database is away: these are the last known votes.</p>
% end
% if not any(any(votes.values()) for _, votes in days):
<p class="intro">There was no vote in the last 30 days.</p>
<p><a class="step" href="/">Cast the first</a></p>
% else:
<p class="intro">Fruit Gummi’s votes go up, Pita’s go down. All times are UTC.</p>
%   for heading, unit, form, rows in (("Two days, hour by hour", "hour", "%d %b, %H:%M", hours), ("A month, day by day", "day", "%d %b", days)):
%     most = max([1, *(count for _, votes in rows for count in votes.values())])
<section>
<h2>{{heading}}</h2>
<p class="ends"><span>↑ Fruit Gummi</span> <span>at most {{"{:,}".format(most)}}</span></p>
<svg class="chart" viewBox="-.5 -100 {{len(rows)}} 200" preserveAspectRatio="none" role="img" aria-label="Votes per {{unit}}; the table has the numbers">
%     for cat, direction in (("Gummi", -100), ("Pita", 100)):
<path data-bar="{{cat}}" d="
%       for place, (_, votes) in enumerate(rows):
M{{place}} 0V{{round(direction * votes[cat] / most, 2)}}
%       end
"/>
%     end
</svg>
<p class="ends"><span>↓ Pita</span></p>
<p class="ends"><span>{{rows[0][0].strftime(form)}}</span> <span>{{rows[-1][0].strftime(form)}}</span></p>
<details>
<summary>Votes per {{unit}} as a table</summary>
<table>
<thead><tr><th scope="col">{{unit.capitalize()}}</th><th scope="col">Fruit Gummi</th><th scope="col">Pita</th></tr></thead>
<tbody>
%     for time, votes in reversed(rows):
<tr><th scope="row">{{time.strftime(form)}}</th><td>{{"{:,}".format(votes["Gummi"])}}</td><td>{{"{:,}".format(votes["Pita"])}}</td></tr>
%     end
</tbody>
</table>
</details>
</section>
%   end
% end
