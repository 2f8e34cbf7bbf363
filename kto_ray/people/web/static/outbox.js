// Answers on their way, and answers to be taken back: kept in this browser until the server has dealt with them, and
// sent one after the other, in order. The server takes the same answer twice as one, so sending again is harmless.

import { Lost, Refusal, call, sleep } from "./api.js";

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 15000;

export class Outbox {
  // `on` has wanted(): how many images to ask for with an answer; and is told of it all: taken(step, reply),
  // refused(step, refusal), shut(refusal), lost() and found().
  constructor(key, on) {
    this.key = key;
    this.on = on;
    this.isSending = false;
    this.memory = "[]";
  }

  // What is kept is read anew every time: another tab may have sent some of it.
  get steps() {
    try {
      return JSON.parse(localStorage.getItem(this.key) ?? "[]");
    } catch {
      return JSON.parse(this.memory); // no storage in this browser, then for as long as the page is open
    }
  }

  set steps(steps) {
    this.memory = JSON.stringify(steps);
    try {
      localStorage.setItem(this.key, this.memory);
    } catch {
      // See above.
    }
  }

  get isEmpty() {
    return this.steps.length === 0;
  }

  add(step) {
    this.steps = [...this.steps, { ...step, id: `${Date.now()} ${Math.random()}` }];
    this.send();
  }

  // Drop the latest step, if it is an answer on this item that was never sent; gives it, or undefined.
  cancel(item) {
    const steps = this.steps;
    const last = steps.at(-1);
    if (last?.kind !== "answer" || last.item !== item || last.tried) return undefined;
    this.steps = steps.slice(0, -1);
    return last;
  }

  concerns(item) {
    return this.steps.some((step) => step.item === item);
  }

  async send() {
    if (this.isSending) return;
    this.isSending = true;
    try {
      for (let step; (step = this.steps[0]); ) if (!(await this.deal(step))) return;
    } finally {
      this.isSending = false;
    }
  }

  // Have the server take or refuse a step, however long that takes; false when nothing will be taken any more.
  async deal(step) {
    this.steps = this.steps.map((other) => (other.id === step.id ? { ...other, tried: true } : other));
    let reply, refusal;
    for (let waitMs = FIRST_WAIT_MS; !reply && !refusal; waitMs = Math.min(2 * waitMs, LONGEST_WAIT_MS)) {
      try {
        reply = await this.deliver(step);
      } catch (error) {
        if (error instanceof Refusal) refusal = error;
        else if (!(error instanceof Lost)) throw error;
        else {
          this.on.lost();
          await sleep(Math.max(waitMs, error.waitMs), "online");
        }
      }
    }
    this.on.found();
    if (refusal?.isFinal) {
      this.on.shut(refusal);
      return false;
    }
    this.steps = this.steps.filter((other) => other.id !== step.id);
    if (refusal) this.on.refused(step, refusal);
    else this.on.taken(step, reply);
    return true;
  }

  deliver({ kind, item, verdict, seconds }) {
    if (kind === "undo") return call("undo", { item });
    return call("answer", { item, verdict, seconds, count: this.on.wanted() });
  }
}
