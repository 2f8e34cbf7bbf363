// One image: the slider over policies shows each picture at once, its story when it rests; and the keys.

import { parse, renew } from "./live.js";

const element = (id) => document.getElementById(id);
const slider = element("policy");
const REST_MS = 250;
let resting;

const choices = () => [...element("policies").querySelectorAll("a")];

function show() {
  const all = choices();
  const chosen = all[slider.value];
  const { picture, policy, label } = chosen.dataset;
  if (element("picture")) element("picture").src = picture;
  element("canvas").className = label;
  element("version").textContent = policy;
  slider.setAttribute("aria-valuetext", `policy ${policy}`);
  all.forEach((one) => one.toggleAttribute("aria-current", one === chosen));
  clearTimeout(resting);
  resting = setTimeout(() => tell(chosen), REST_MS);
}

async function tell(chosen) {
  history.replaceState(null, "", chosen.href);
  try {
    const response = await fetch(chosen.href, { redirect: "error" });
    if (!response.ok || choices()[slider.value] !== chosen) return;
    renew(parse(await response.text()).querySelector('[data-part="story"]'));
  } catch {
    // the connection is lost; live.js says so
  }
}

function slide(by) {
  slider.value = Number(slider.value) + by;
  show();
}

if (slider) {
  slider.addEventListener("input", show);
  element("policies").addEventListener("click", (event) => {
    const chosen = event.target.closest("a");
    if (!chosen || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    slider.value = choices().indexOf(chosen);
    show();
  });
  for (const one of choices()) new Image().src = one.dataset.picture; // so that sliding is smooth
}

const KEYS = { k: "before", j: "after", Escape: "back" };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input:not(#policy), select")) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && slider) {
    event.preventDefault();
    slide(step);
  } else if (step) {
    element(step < 0 ? "before" : "after")?.click();
  } else if (KEYS[event.key]) {
    element(KEYS[event.key])?.click();
  }
});
