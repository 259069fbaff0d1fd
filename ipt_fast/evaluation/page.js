"use strict";
for (const figure of document.querySelectorAll("figure:not(.failed)")) {
  const view = figure.querySelector(".view"), range = view.querySelector("input");
  const images = view.querySelectorAll("img"), buttons = figure.querySelectorAll("[data-pair]");
  const move = () => view.style.setProperty("--cut", range.value + "%");
  const compare = (first, second) => {
    images.forEach((image, i) => image.className = i === first ? "first" : i === second ? "second" : "");
    view.querySelector(".left").textContent = images[first].alt;
    view.querySelector(".right").textContent = images[second].alt;
    buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.pair === `${first}${second}`));
  };
  const follow = (event) => {
    const box = view.getBoundingClientRect();
    range.value = Math.round(100 * (event.clientX - box.left) / box.width);
    move();
  };
  range.addEventListener("input", move);
  view.addEventListener("pointerdown", (event) => {
    view.setPointerCapture(event.pointerId);
    range.focus({ preventScroll: true });
    follow(event);
  });
  view.addEventListener("pointermove", (event) => { if (view.hasPointerCapture(event.pointerId)) follow(event); });
  // A press on what is not focusable would take the focus away from the slider.
  view.addEventListener("mousedown", (event) => event.preventDefault());
  buttons.forEach((button) => button.addEventListener("click", () => compare(...[...button.dataset.pair].map(Number))));
  const wide = figure.querySelector(".wide");
  wide.addEventListener("click", () => wide.setAttribute("aria-pressed", figure.classList.toggle("large")));
  compare(0, 1);
  move();
}
