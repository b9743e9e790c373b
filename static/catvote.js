// The tally follows everybody's votes while the page is visible; an impatient click counts once.

const form = document.querySelector("form");
const part = (name, cat) => document.querySelector(`[data-${name}=${cat}]`);
// Half to even, as the server rounds, makes both shares add up to 100 %.
const percent = new Intl.NumberFormat("en", { style: "percent", roundingMode: "halfEven" });
let delay = 2000;
let tag = "";

function show(votes) {
  const total = votes.Gummi + votes.Pita;
  for (const [cat, count] of Object.entries(votes)) {
    const share = count / (total || 1);
    part("votes", cat).textContent = count.toLocaleString("en");
    part("noun", cat).textContent = count === 1 ? "vote" : "votes";
    part("percent", cat).textContent =
      0 < share && share < 0.01 ? "<1%" : 0.99 < share && share < 1 ? ">99%" : percent.format(share);
    part("lead", cat).hidden = share <= 0.5;
    part("bar", cat).setAttribute("width", `${100 * share}%`);
  }
}

async function follow() {
  if (!document.hidden) {
    let fresh = false;
    try {
      const signal = AbortSignal.timeout(9000);
      const answer = await fetch("/tally.json", { headers: { "If-None-Match": tag }, signal });
      if (answer.status === 200) {
        show(await answer.json());
        tag = answer.headers.get("ETag");
      }
      fresh = answer.status < 400 && !answer.headers.has("Age");
    } catch {}
    document.querySelector("#outdated").hidden = fresh;
    delay = fresh ? 2000 : Math.min(2 * delay, 30000);
  }
  setTimeout(follow, delay);
}

function ready() {
  form.ariaBusy = null;
}

setTimeout(follow, delay);
// A reload is no vote, so it should not be thanked for one.
if (location.search) history.replaceState(null, "", location.pathname);

form.addEventListener("submit", (event) => {
  if (form.ariaBusy) event.preventDefault();
  form.ariaBusy = true;
  setTimeout(ready, 9000); // for a visitor who has stopped the request
});
addEventListener("pageshow", ready); // by the back button, as it was left
// The second click of a double click may land on the next page.
form.addEventListener("click", (event) => event.detail > 1 && event.preventDefault());
