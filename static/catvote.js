// Keeps the tally up to date, and counts an impatient click once. It knows the candidates from the page.

const [form] = document.forms;
const cats = [...document.querySelectorAll("[data-votes]")].map((element) => element.dataset.votes);
const part = (name, cat) => document.querySelector(`[data-${name}="${CSS.escape(cat)}"]`);
// Half to even, as on the server, so that the shares of two add up to 100 %.
const whole = { maximumFractionDigits: 0, roundingMode: "halfEven" };

function percent(share) {
  if (share > 0 && share < 1) return "<1%";
  if (share > 99 && share < 100) return ">99%";
  return `${share.toLocaleString("en", whole)}%`;
}

function show(tally) {
  const votes = cats.map((cat) => tally[cat] ?? 0);
  const total = votes.reduce((sum, count) => sum + count, 0);
  const most = Math.max(...votes);
  const leaders = cats.filter((cat, place) => votes[place] === most);
  let left = 0;
  cats.forEach((cat, place) => {
    const count = votes[place];
    const share = (100 * count) / (total || 1);
    part("votes", cat).textContent = count.toLocaleString("en");
    part("noun", cat).textContent = count === 1 ? "vote" : "votes";
    part("share", cat).textContent = percent(share);
    part("lead", cat).hidden = leaders.length > 1 || leaders[0] !== cat;
    part("bar", cat).setAttribute("x", `${left}%`);
    part("bar", cat).setAttribute("width", `${share}%`);
    left += share;
  });
}

// The live tally

let delay = 2000;
let tag = "";
let request = new AbortController();
let next = setTimeout(follow, delay);

async function follow() {
  clearTimeout(next);
  request.abort(); // it may wait for a network that is gone
  if (document.hidden) return; // until it is looked at again
  const mine = (request = new AbortController());
  setTimeout(() => mine.abort(), 9000);
  let fresh = false;
  try {
    // Not the path alone: that fails in a page opened as https://user:password@host/.
    const answer = await fetch(`${location.origin}/tally.json`, {
      headers: { "If-None-Match": tag },
      signal: mine.signal,
    });
    if (answer.ok) {
      show(await answer.json());
      tag = answer.headers.get("ETag");
    }
    fresh = answer.status < 400 && !(answer.headers.get("Age") > 1);
  } catch {}
  if (mine !== request) return; // a later one has taken over
  document.querySelector("#outdated").hidden = fresh;
  delay = fresh ? 2000 : Math.min(2 * delay, 30000);
  next = setTimeout(follow, delay);
}

// Back after a while offline, or looked at again
window.ononline = document.onvisibilitychange = () => {
  delay = 1000;
  follow();
};

// Voting

const busy = () => form.getAttribute("aria-busy") === "true";
const ready = () => form.removeAttribute("aria-busy");

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
