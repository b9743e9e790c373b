// Keeps the tally up to date, and counts an impatient click once.

const [form] = document.forms;
const part = (name, cat) => document.querySelector(`[data-${name}=${cat}]`);
// Half to even, as on the server, so that shares add up to 100 %.
const whole = { maximumFractionDigits: 0, roundingMode: "halfEven" };
let delay = 2000;
let tag = "";

function show(votes) {
  const total = votes.Gummi + votes.Pita || 1;
  for (const [cat, count] of Object.entries(votes)) {
    const share = (100 * count) / total;
    const extreme = share % 100 && (share < 1 ? "<1" : share > 99 && ">99");
    part("votes", cat).textContent = count.toLocaleString("en");
    part("noun", cat).textContent = count === 1 ? "vote" : "votes";
    part("share", cat).textContent = `${extreme || share.toLocaleString("en", whole)}%`;
    part("lead", cat).hidden = share <= 50;
    part("bar", cat).setAttribute("width", `${share}%`);
  }
}

async function follow() {
  if (!document.hidden) {
    let fresh = false;
    try {
      const signal = AbortSignal.timeout(9000);
      const answer = await fetch("/tally.json", { headers: { "If-None-Match": tag }, signal });
      if (answer.ok) {
        show(await answer.json());
        tag = answer.headers.get("ETag");
      }
      fresh = answer.status < 400 && !(answer.headers.get("Age") > 1);
    } catch {}
    document.querySelector("#outdated").hidden = fresh;
    delay = fresh ? 2000 : Math.min(2 * delay, 30000);
  }
  setTimeout(follow, delay);
}

const ready = () => form.removeAttribute("aria-busy");

setTimeout(follow, delay);
// Nobody should be thanked for a reload.
history.replaceState(null, "", "/");
// The back button brings the page back as it was left.
window.onpageshow = ready;
form.onsubmit = () => {
  form.ariaBusy = true;
  setTimeout(ready, 9000); // in case the visitor stopped it
};
// The second click of a double click may land on the next page.
form.onclick = (event) => !form.ariaBusy && event.detail < 2;
