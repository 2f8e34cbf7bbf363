// The page on which images are judged: what is on screen, and what keys, buttons and swipes do.
//
//     keys, buttons, swipe.js -> answer() -> deck.js: the next image, at once
//                                   +-----> outbox.js -> api.js: the answer, in the background

import { Lost, Refusal, call, sleep } from "./api.js";
import { Deck } from "./deck.js";
import { Outbox } from "./outbox.js";
import { makeSwipable } from "./swipe.js";

const AHEAD = 6; // the image on screen and the next five
const MOST_OFFERS = 10; // that the server gives at once
const REMEMBERED = 10; // images that an undo shows again without asking for them
const TOO_FAST_MS = 150; // nobody judges in that time, but a double click is so fast
const POLL_MS = [1000, 3000]; // from, to: when there is nothing to show
const NOTICE_MS = 6000;
const LONG_PROMPT = 140; // letters; longer ones are set smaller

const element = (id) => document.getElementById(id);
const meta = (name) => document.querySelector(`meta[name="${name}"]`).content;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

const BUTTONS = ["desirable", "undesirable", "unsure", "skip"];
const KEYS = {
  ArrowRight: "desirable",
  l: "desirable",
  ArrowLeft: "undesirable",
  d: "undesirable",
  ArrowDown: "unsure",
  u: "unsure",
  " ": "skip",
};
// The same keys by their place, for keyboards that write other letters than Latin ones.
const PLACES = { KeyL: "desirable", KeyD: "undesirable", KeyU: "unsure", Space: "skip" };
const ASCII = /^[ -~]$/;

let progress = null; // as the server said last
let shut = null; // the refusal after which nothing works any more
let isLost = false;
let isPolling = false;
let shown = null; // the card whose picture is on screen
const earlier = new Map(); // cards that were answered, by item
const watch = { since: 0, spent: 0 }; // how long the image has been looked at

const deck = new Deck(render, giveUpOn);
const path = location.pathname.replace(/[^/]*$/, "");
const outbox = new Outbox(`kto-ray ${path} ${meta("labeler")}`, {
  // What is still on its way is held, too, and comes again.
  wanted: () => Math.min(MOST_OFFERS, AHEAD + outbox.steps.length - 1),
  taken(step, reply) {
    if (step.kind === "answer") return merge(reply);
    if (progress) {
      progress.answers -= 1;
      progress.undoable = progress.undoable.filter((item) => item !== step.item);
    }
    if (!deck.has(step.item) && !outbox.concerns(step.item)) deck.putOnTop(reply);
    render();
  },
  refused(step, refusal) {
    if (!outbox.concerns(step.item)) deck.remove(step.item);
    say(`${step.kind === "undo" ? "Not taken back" : "Not counted"}: ${refusal.message}.`);
    render();
  },
  shut: close,
  lost: () => setLost(true),
  found: () => setLost(false),
});

// -- what the server says

function merge(turn) {
  progress = turn.progress;
  for (const offer of turn.offers) {
    if (!deck.has(offer.item) && !outbox.concerns(offer.item)) deck.push(offer);
  }
  render();
}

async function poll() {
  if (isPolling) return;
  isPolling = true;
  let [waitMs, longestMs] = POLL_MS;
  while (!shut && deck.isEmpty) {
    // An outbox that is not empty asks for images itself.
    if (outbox.isEmpty && !document.hidden) {
      try {
        merge(await call("lease", { count: AHEAD }));
        setLost(false);
      } catch (error) {
        if (error instanceof Refusal) close(error);
        else if (error instanceof Lost) setLost(true);
        else throw error;
      }
    }
    if (!deck.isEmpty) break;
    await sleep(waitMs, "online", "visible");
    waitMs = Math.min(1.3 * waitMs, longestMs);
  }
  isPolling = false;
}

async function extend() {
  const items = deck.items;
  if (document.hidden || shut || items.length === 0) return;
  try {
    const kept = (await call("extend", { items })).items;
    for (const item of items) {
      if (kept.includes(item) || outbox.concerns(item) || !deck.has(item)) continue;
      if (shown?.item === item) say("That image went to somebody else, or its round is complete.");
      deck.remove(item);
    }
    render();
  } catch (error) {
    if (error instanceof Refusal && error.isFinal) close(error);
  }
}

function release(items) {
  if (items.length && !shut) call("release", { items }, { keepalive: true }).catch(() => {});
}

function giveUpOn(card) {
  if (!deck.has(card.item)) return;
  deck.remove(card.item);
  release([card.item]);
  say("An image could not be loaded; here is the next one.");
  render();
}

// -- what people do

function answer(said) {
  const card = shown;
  if (!card || shut || performance.now() - card.shownAt < TOO_FAST_MS) return false;
  const seconds = Math.round(stopWatch() * 100) / 100;
  deck.remove(card.item);
  remember(card);
  outbox.add({ kind: "answer", item: card.item, verdict: said, seconds, prompt: card.prompt, image: card.image });
  flash(said);
  render();
  return true;
}

function undo() {
  const item = undoable()[0];
  if (shut) return;
  if (item === undefined) return say("There is nothing to take back.");
  const kept = outbox.steps.findLast((step) => step.kind === "answer" && step.item === item);
  if (!outbox.cancel(item)) outbox.add({ kind: "undo", item });
  const card = earlier.get(item) ?? kept;
  if (card) deck.putOnTop(card); // else the server's reply brings it
  flash("undo");
  render();
}

// Items whose answers can be taken back, the latest first: what the server knows, and what is on its way there.
function undoable() {
  let items = progress?.undoable ?? [];
  for (const step of outbox.steps) {
    items = items.filter((item) => item !== step.item);
    if (step.kind === "answer") items.unshift(step.item);
  }
  return items;
}

function remember(card) {
  earlier.delete(card.item);
  earlier.set(card.item, card);
  if (earlier.size > REMEMBERED) earlier.delete(earlier.keys().next().value);
}

// -- what is on screen

function render() {
  const card = shut ? undefined : deck.top;
  element("card").hidden = !card;
  element("pause").hidden = Boolean(card);
  if (card) show(card);
  else pause();
  if (!card) poll();
  for (const id of BUTTONS) element(id).setAttribute("aria-disabled", String(!shown));
  element("undo").setAttribute("aria-disabled", String(Boolean(shut) || undoable().length === 0));
  renderProgress();
}

function show(card) {
  const stage = element("stage");
  const prompt = element("prompt");
  if (prompt.dataset.item !== card.item) {
    prompt.dataset.item = card.item;
    prompt.textContent = card.prompt; // text, whatever it looks like
    prompt.classList.toggle("long", card.prompt.length > LONG_PROMPT);
    prompt.scrollTop = 0;
  }
  if (shown === card) return;
  stage.querySelector("img")?.remove();
  stage.classList.remove("settling");
  stage.classList.toggle("loading", !card.picture);
  shown = card.picture ? card : null;
  if (!shown) return;
  stage.append(card.picture);
  element("card").style.setProperty("--ratio", card.ratio);
  card.shownAt = performance.now();
  startWatch();
}

function pause() {
  element("stage").querySelector("img")?.remove();
  shown = null;
  const [title, text, isOver] = words();
  element("pause").classList.toggle("over", isOver);
  if (element("pause-title").textContent !== title) element("pause-title").textContent = title;
  if (element("pause-text").textContent !== text) element("pause-text").textContent = text;
}

// Title, text, and whether nothing more is to come.
function words() {
  const unsent = outbox.steps.length ? ` ${plural(outbox.steps.length, "answer")} could not be sent and stay in this browser.` : "";
  if (shut?.why === "excluded") return ["Thank you", `${capital(shut.message)}.`, true];
  if (shut?.why === "form") return ["Another link was opened in this browser", `Reload this page to go on with it.${unsent}`, true];
  if (shut) return ["This link no longer works", `${capital(shut.message)}.${unsent}`, true];
  if (isLost) return ["Connection lost", "This page tries again by itself.", false];
  if (!outbox.isEmpty) return ["One moment", "Your answers are being sent.", false];
  const number = progress?.round;
  switch (progress?.waits_for) {
    case "images":
      return ["Images are being drawn", "The next ones appear here as soon as they are done.", false];
    case "people":
      return [
        "Nothing left for you in this round",
        `The last images of round ${number} are with other people, or you skipped them. The next round's appear here by themselves.`,
        false,
      ];
    case "training":
      return [
        `Round ${number} is complete`,
        "The model now learns from it. New images appear here when it has; you need not do anything.",
        false,
      ];
    case "nothing":
      return ["Thank you", "The run has ended. There is nothing left to do.", true];
    default:
      return ["One moment", "Looking for images.", false];
  }
}

function renderProgress() {
  const unsent = outbox.steps.length;
  if (progress && progress.round !== null) {
    const { round, judged, asked, target } = progress;
    element("round").textContent =
      target === null ? `Round ${round}: ${judged} of ${asked} so far judged` : `Round ${round}: ${judged} of ${target} judged`;
    element("progress").max = Math.max(1, target ?? asked);
    element("progress").value = judged;
  }
  const given = outbox.steps.reduce((sum, step) => sum + (step.kind === "answer" ? 1 : -1), progress?.answers ?? 0);
  element("mine").textContent = progress ? `You: ${plural(given, "answer")}` : "";
  const isOver = shut || (progress?.waits_for === "nothing" && deck.isEmpty && !unsent);
  const kept = unsent ? `: ${plural(unsent, "answer")} ${unsent === 1 ? "is" : "are"} kept and will be sent` : "";
  put("connection", isLost && !isOver && (unsent || !deck.isEmpty) ? `Connection lost${kept}` : "");
}

// Only what differs is written, or screen readers would say it again.
function put(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text;
}

function setLost(lost) {
  isLost = lost;
  render();
}

function close(refusal) {
  shut = refusal;
  render();
}

let noticeTimer;
function say(text) {
  put("notice", text);
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => put("notice", ""), NOTICE_MS);
}

function flash(id) {
  const button = element(id);
  button.classList.remove("said");
  void button.offsetWidth; // so that the animation starts anew
  button.classList.add("said");
}

// -- how long an image is looked at

function startWatch() {
  watch.since = performance.now();
  watch.spent = 0;
}

function pauseWatch() {
  watch.spent += performance.now() - watch.since;
}

function stopWatch() {
  pauseWatch();
  return watch.spent / 1000;
}

// -- keys, buttons, the page itself

function saidBy({ key, code }) {
  return KEYS[key] ?? KEYS[key.toLowerCase()] ?? (ASCII.test(key) ? undefined : PLACES[code]);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || element("help").open) return;
  const isOnButton = event.target instanceof Element && event.target.closest("button, a, summary");
  if (isOnButton && (event.code === "Space" || event.key === " " || event.key === "Enter")) return; // that presses the button
  if (event.key === "ArrowDown" && event.target === element("prompt")) return; // that scrolls a long one
  const said = saidBy(event);
  if (!said && event.key !== "Backspace" && event.key !== "?") return;
  event.preventDefault();
  if (event.repeat) return; // a key that is held down judges one image
  if (said) answer(said);
  else if (event.key === "Backspace") undo();
  else element("help").showModal();
});

for (const id of BUTTONS) element(id).addEventListener("click", () => answer(id));
element("undo").addEventListener("click", undo);
element("open-help").addEventListener("click", () => element("help").showModal());
makeSwipable(element("stage"), answer);

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return pauseWatch();
  watch.since = performance.now();
  dispatchEvent(new Event("visible"));
  extend();
});
setInterval(extend, (1000 * Number(meta("lease-seconds"))) / 3);
addEventListener("pagehide", () => release(deck.items.slice(1)));
addEventListener("pageshow", (event) => event.persisted && location.reload()); // what was not shown was given back

outbox.send();
render();
