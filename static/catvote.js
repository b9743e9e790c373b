// Keeps the tally up to date, and counts an impatient click once. It knows the candidates from the page.

const [form] = document.forms;
const cats = [...document.querySelectorAll("[data-votes]")].map((element) => element.dataset.votes);
const part = (name, cat) => document.querySelector(`[data-${name}="${CSS.escape(cat)}"]`);
// Half to even, as on the server, so that shares add up to 100 %.
const whole = { maximumFractionDigits: 0, roundingMode: "halfEven" };
let delay = 2000;
let tag = "";

function show(tally) {
  const votes = cats.map((cat) => tally[cat] ?? 0);
  const most = Math.max(...votes);
  const total = votes.reduce((sum, count) => sum + count, 0) || 1;
  const alone = votes.filter((count) => count === most).length === 1;
  let left = 0;
  cats.forEach((cat, place) => {
    const count = votes[place];
    const share = (100 * count) / total;
    const extreme = share % 100 && (share < 1 ? "<1" : share > 99 && ">99");
    part("votes", cat).textContent = count.toLocaleString("en");
    part("noun", cat).textContent = count === 1 ? "vote" : "votes";
    part("share", cat).textContent = `${extreme || share.toLocaleString("en", whole)}%`;
    part("lead", cat).hidden = !(alone && count === most);
    part("bar", cat).setAttribute("x", `${left}%`);
    part("bar", cat).setAttribute("width", `${share}%`);
    left += share;
  });
}

async function follow() {
  if (!document.hidden) {
    const abort = new AbortController();
    const timer = setTimeout(() => abort.abort(), 9000);
    let fresh = false;
    try {
      const answer = await fetch("/tally.json", { headers: { "If-None-Match": tag }, signal: abort.signal });
      if (answer.ok) {
        show(await answer.json());
        tag = answer.headers.get("ETag");
      }
      fresh = answer.status < 400 && !(answer.headers.get("Age") > 1);
    } catch {}
    clearTimeout(timer);
    document.querySelector("#outdated").hidden = fresh;
    delay = fresh ? 2000 : Math.min(2 * delay, 30000);
  }
  setTimeout(follow, delay);
}

const busy = () => form.getAttribute("aria-busy") === "true";
const ready = () => form.removeAttribute("aria-busy");

setTimeout(follow, delay);
// Nobody should be thanked for a reload.
history.replaceState(null, "", "/");
// The back button brings the page back as it was left.
window.onpageshow = ready;
form.onsubmit = () => {
  form.setAttribute("aria-busy", "true");
  setTimeout(ready, 9000); // in case the visitor stopped it
};
// The second click of a double click may land on the next page.
form.onclick = (event) => !busy() && event.detail < 2;
