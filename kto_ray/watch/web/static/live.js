// Keeps a page up to date: fetches it anew, and puts in the parts that changed. Imported, it is also `renew`.

const EVERY_MS = 3000;
const isLive = document.querySelector('meta[name="live"]')?.content === "yes";

const element = (id) => document.getElementById(id);
const parts = (root) => [...root.querySelectorAll("[data-part]")];
const served = new Map(parts(document).map((part) => [part.dataset.part, part.innerHTML]));
let tag = "";

const sleep = (ms) =>
  new Promise((resolve) => {
    const wake = () => {
      clearTimeout(timer);
      removeEventListener("visible", wake);
      resolve();
    };
    const timer = setTimeout(wake, ms);
    addEventListener("visible", wake);
  });

// Images that are there already stay the same elements, so that nothing flickers; so does what has the focus.
export function renew(fresh) {
  const { part } = fresh.dataset;
  if (served.get(part) === fresh.innerHTML) return;
  const old = document.querySelector(`[data-part="${CSS.escape(part)}"]`);
  if (!old) return;
  served.set(part, fresh.innerHTML);
  const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  const images = new Map([...old.querySelectorAll("img")].map((image) => [image.getAttribute("src"), image]));
  for (const image of fresh.querySelectorAll("img")) {
    const same = images.get(image.getAttribute("src"));
    if (same) image.replaceWith(same);
  }
  old.replaceChildren(...fresh.childNodes);
  if (focused) old.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

export const parse = (html) => new DOMParser().parseFromString(html, "text/html");

async function refresh() {
  let response, html;
  try {
    response = await fetch(location.href, { redirect: "error", headers: tag ? { "If-None-Match": tag } : {} });
    html = response.status === 200 ? await response.text() : "";
  } catch {
    return complain("Connection lost; what is shown is from before. This page tries again by itself.");
  }
  if (response.status === 401 || response.status === 403) {
    complain("This link no longer works; whoever started the page has a new one.");
    return false;
  }
  if (response.status !== 200 && response.status !== 304) return complain("The server is busy; this is from before.");
  complain("");
  if (response.status === 304) return;
  tag = response.headers.get("ETag") ?? "";
  const page = parse(html);
  // Whoever holds a part back, as the grid does while somebody looks further down, takes it out of the page.
  dispatchEvent(new CustomEvent("fresh", { detail: page }));
  for (const part of parts(page)) renew(part);
}

function complain(text) {
  element("connection").hidden = !text;
  if (element("connection").textContent !== text) element("connection").textContent = text;
}

document.addEventListener("visibilitychange", () => dispatchEvent(new Event("visible")));

async function goOn() {
  do await sleep(EVERY_MS);
  while (document.hidden || (await refresh()) !== false);
}
if (isLive) goOn();
