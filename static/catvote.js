// The tally follows everybody's votes while the page is visible; an impatient click counts once.

const form = document.querySelector("form");
const part = (name, cat) => document.querySelector(`[data-${name}=${cat}]`);
// Half to even, as the server rounds: so both shares add up to 100 %.
const percent = { style: "percent", roundingMode: "halfEven" };
let delay = 2000;
let tag = "";

function show(votes) {
  const total = votes.Gummi + votes.Pita || 1;
  for (const [cat, count] of Object.entries(votes)) {
    const share = count / total;
    const extreme = (count && share < 0.01 && "<1%") || (share < 1 && share > 0.99 && ">99%");
    part("votes", cat).textContent = count.toLocaleString("en");
    part("noun", cat).textContent = count === 1 ? "vote" : "votes";
    part("share", cat).textContent = extreme || share.toLocaleString("en", percent);
    part("lead", cat).hidden = share <= 0.5;
    part("bar", cat).setAttribute("width", `${100 * share}%`);
  }
}

async function follow() {
  if (!document.hidden) {
    let fresh = false;
    try {
      const answer = await fetch("/tally.json", { headers: { "If-None-Match": tag } });
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

const ready = () => form.removeAttribute("aria-busy");

setTimeout(follow, delay);
// A reload is no vote, so it should not be thanked for one.
if (location.search) history.replaceState(null, "", "/");
// The back button may bring the page back as it was left.
window.onpageshow = ready;
form.onsubmit = () => {
  form.ariaBusy = true;
  setTimeout(ready, 9000); // for a visitor who has stopped it
};
// The second click of a double click may land on the next page.
form.onclick = (event) => !form.ariaBusy && event.detail < 2;
