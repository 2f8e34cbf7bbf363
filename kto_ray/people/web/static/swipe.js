// Swiping the image: it follows the finger, says what letting go would mean, and answers if it was pulled far enough.

const FAR_SHARE = 0.28; // of the stage's width,
const FAR_PX = 130; // or so many pixels
const START_PX = 8;
const isCalm = matchMedia("(prefers-reduced-motion: reduce)");

// `answer(said)` is called when the image is let go far enough to one side.
export function makeSwipable(stage, answer) {
  let start = null;

  const pictureOf = () => stage.querySelector("img");

  function lean(dx) {
    const far = Math.min(FAR_PX, stage.clientWidth * FAR_SHARE);
    stage.dataset.lean = dx > 0 ? "desirable" : "undesirable";
    stage.style.setProperty("--pull", Math.min(1, Math.abs(dx) / far));
    const turn = isCalm.matches ? 0 : dx / 40;
    pictureOf()?.style.setProperty("transform", `translateX(${dx}px) rotate(${turn.toFixed(2)}deg)`);
    return Math.abs(dx) >= far;
  }

  function letGo() {
    start = null;
    stage.classList.remove("dragging");
    stage.classList.add("settling");
    delete stage.dataset.lean;
    pictureOf()?.style.removeProperty("transform");
  }

  stage.addEventListener("pointerdown", (event) => {
    if (!event.isPrimary || event.button !== 0 || !pictureOf()) return;
    start = { x: event.clientX, id: event.pointerId };
  });
  stage.addEventListener("pointermove", (event) => {
    if (start?.id !== event.pointerId) return;
    const dx = event.clientX - start.x;
    if (!stage.classList.contains("dragging")) {
      if (Math.abs(dx) < START_PX) return;
      stage.setPointerCapture(event.pointerId);
      stage.classList.remove("settling");
      stage.classList.add("dragging");
    }
    lean(dx);
  });
  stage.addEventListener("pointerup", (event) => {
    if (start?.id !== event.pointerId) return;
    const isFar = stage.classList.contains("dragging") && lean(event.clientX - start.x);
    const said = stage.dataset.lean;
    letGo();
    if (isFar) answer(said);
  });
  // Else browsers take the swipe for a fling, and swallow a tap that follows soon, on Undo for instance.
  stage.addEventListener("touchmove", (event) => stage.classList.contains("dragging") && event.preventDefault(), {
    passive: false,
  });
  stage.addEventListener("pointercancel", () => start && letGo());
}
