// Keeps the operator's page up to date: fetches it anew, and puts in the parts that changed.

import { Lost, Refusal, call, sleep } from "./api.js";

const EVERY_MS = 3000;

const element = (id) => document.getElementById(id);
const parts = (root) => [...root.querySelectorAll("[data-part]")];
const served = new Map(parts(document).map((part) => [part.dataset.part, part.innerHTML]));

async function refresh() {
  let response, html;
  try {
    response = await fetch("overview", { redirect: "error" });
    html = await response.text();
  } catch {
    return complain("Connection lost; these figures are from before. This page tries again by itself.");
  }
  if (response.status === 401 || response.status === 403) {
    complain("This link no longer works; the run prints a new one when it is started again.");
    return false;
  }
  if (!response.ok) return complain("The server is busy; these figures are from before.");
  complain("");
  for (const part of parts(new DOMParser().parseFromString(html, "text/html"))) renew(part);
}

// Images that are there already stay the same elements, so that nothing flickers; so does what has the focus.
function renew(fresh) {
  const { part } = fresh.dataset;
  if (served.get(part) === fresh.innerHTML) return;
  served.set(part, fresh.innerHTML);
  const old = document.querySelector(`[data-part="${part}"]`);
  const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
  const images = new Map([...old.querySelectorAll("img")].map((image) => [image.getAttribute("src"), image]));
  for (const image of fresh.querySelectorAll("img")) {
    const same = images.get(image.getAttribute("src"));
    if (same) image.replaceWith(same);
  }
  const scrolled = [...old.querySelectorAll(".scroll, .rounds")].map((box) => [box.scrollLeft, box.scrollTop]);
  old.replaceChildren(...fresh.childNodes);
  old.querySelectorAll(".scroll, .rounds").forEach((box, i) => scrolled[i] && box.scrollTo(...scrolled[i]));
  if (focused) element(focused)?.focus({ preventScroll: true });
}

function complain(text) {
  element("connection").hidden = !text;
  if (element("connection").textContent !== text) element("connection").textContent = text;
}

const WORDS = {
  exclude: ["Exclude", "No more images are asked about, and the answers in rounds that are still open are taken out."],
  include: ["Include", "Images are asked about again. Answers that were taken out stay out."],
};

function ask({ name, act }) {
  const [verb, text] = WORDS[act];
  element("confirm-title").textContent = `${verb} ${name}?`;
  element("confirm-text").textContent = text;
  element("confirm-yes").textContent = verb;
  element("confirm-yes").className = act === "exclude" ? "bad" : "good";
  element("confirm").returnValue = "no";
  element("confirm").showModal();
  element("confirm").onclose = async () => {
    if (element("confirm").returnValue !== "yes") return;
    try {
      await call(`labelers/${act}`, { name });
    } catch (error) {
      if (error instanceof Refusal) return complain(`${error.message}.`);
      if (error instanceof Lost) return complain("Connection lost; try again.");
      throw error;
    }
    await refresh();
  };
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (button) ask(button.dataset);
});
document.addEventListener("visibilitychange", () => dispatchEvent(new Event("visible")));

do await sleep(EVERY_MS, "visible");
while (document.hidden || (await refresh()) !== false);
