// The grid: filters, further pages as one scrolls, arrow keys, and new images without moving what somebody looks at.

import { parse, renew } from "./live.js";

const element = (id) => document.getElementById(id);
const filters = element("filters");
const grid = document.querySelector(".grid");
const TYPING_MS = 400;

// -- filters: the address has them, without those that ask for everything

function look() {
  const asked = [...new FormData(filters)].filter(([, value]) => value !== "");
  const query = new URLSearchParams(asked).toString();
  if (`?${query}` !== (location.search || "?")) location.search = query;
}

let typing;
filters.addEventListener("submit", (event) => {
  event.preventDefault();
  look();
});
filters.addEventListener("change", look);
element("prompt").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    sessionStorage.setItem("typing", "yes");
    look();
  }, TYPING_MS);
});
if (sessionStorage.getItem("typing")) {
  sessionStorage.removeItem("typing");
  const { value } = element("prompt");
  element("prompt").focus({ preventScroll: true });
  element("prompt").setSelectionRange(value.length, value.length);
}

// -- further pages

let loading = false;
let further = false;

async function add() {
  const next = element("next");
  if (loading || !next) return;
  loading = true;
  try {
    const response = await fetch(next.href, { redirect: "error" });
    if (!response.ok) return;
    const page = parse(await response.text());
    const more = page.querySelector(".grid");
    delete more.dataset.part;
    document.querySelector(".pages").before(document.adoptNode(more));
    document.querySelector(".pages").replaceWith(document.adoptNode(page.querySelector(".pages")));
    further = true;
    observer.disconnect();
    observer.observe(document.querySelector(".pages"));
  } catch {
    // the connection is lost; the next scroll tries again
  } finally {
    loading = false;
  }
}

const observer = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && add(), {
  rootMargin: "1200px",
});
observer.observe(document.querySelector(".pages"));

// -- new images: at the top they come by themselves, further down they wait until they are asked for

let waiting;

addEventListener("fresh", (event) => {
  const fresh = event.detail.querySelector(".grid");
  if (!further && scrollY < 80 && !grid.contains(document.activeElement)) return;
  const there = new Set([...document.querySelectorAll(".grid a")].map((tile) => tile.getAttribute("href")));
  const count = [...fresh.querySelectorAll("a")].filter((tile) => !there.has(tile.getAttribute("href"))).length;
  fresh.remove();
  waiting = fresh;
  element("news").hidden = !count;
  element("news").textContent = `${count} new: show`;
});

element("news").addEventListener("click", () => {
  element("news").hidden = true;
  document.querySelectorAll(".grid:not([data-part])").forEach((page) => page.remove());
  further = false;
  renew(waiting);
  scrollTo({ top: 0 });
});

// -- keys

const tiles = () => [...document.querySelectorAll(".grid a")];

function move(key) {
  const all = tiles();
  if (!all.length) return;
  const here = all.indexOf(document.activeElement);
  if (here < 0) return focusOn(all[0]);
  const top = all[here].offsetTop;
  const columns = all.findIndex((tile) => tile.offsetTop !== all[0].offsetTop);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
  if (columns < 0 && (key === "ArrowUp" || key === "ArrowDown")) return;
  const there = all[here + step];
  if (there && there.offsetTop === top && Math.abs(step) > 1) return;
  if (there) focusOn(there);
  if (here + 3 * columns > all.length) add();
}

function focusOn(tile) {
  tile.focus({ preventScroll: true });
  tile.scrollIntoView({ block: "nearest" });
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inField = event.target.closest("input, select, textarea");
  if (event.key === "Escape" && inField) return inField.blur();
  if (inField) return;
  if (event.key === "/") {
    event.preventDefault();
    element("prompt").focus();
    element("prompt").select();
  } else if (event.key.startsWith("Arrow")) {
    event.preventDefault();
    move(event.key);
  }
});
