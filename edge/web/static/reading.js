// Evidence opacity and the keyboard of the study page. Without this file the page still reads and saves.
"use strict";
const evidence = document.getElementById("evidence");
const slider = document.getElementById("opacity");
const toggle = document.getElementById("toggle");
const review = document.getElementById("review");
const kept = "radfleet-opacity";

function show() {
  if (!evidence) return;
  const on = toggle.getAttribute("aria-pressed") === "true";
  evidence.style.opacity = on ? slider.value / 100 : 0;
  toggle.firstChild.textContent = on ? "Hide " : "Show ";
  localStorage.setItem(kept, slider.value);
}

function nudge(step) {
  slider.value = Number(slider.value) + step;
  toggle.setAttribute("aria-pressed", "true");
  show();
}

// The image is enlarged to the room it has; evidence is stretched over exactly its box, whatever its shape.
function fit() {
  const stack = document.querySelector(".film .stack");
  const image = stack?.querySelector("img");
  if (!image?.naturalWidth) return;
  const figure = stack.closest("figure");
  stack.classList.remove("fitted");
  stack.style.width = stack.style.height = "0";
  const scale = Math.min(figure.clientWidth / image.naturalWidth, figure.clientHeight / image.naturalHeight);
  stack.style.width = `${Math.floor(image.naturalWidth * scale)}px`;
  stack.style.height = `${Math.floor(image.naturalHeight * scale)}px`;
  stack.classList.add("fitted");
}

document.querySelector(".film .stack img")?.addEventListener("load", fit);
addEventListener("resize", fit);
fit();

if (evidence) {
  slider.value = localStorage.getItem(kept) ?? slider.value;
  slider.addEventListener("input", () => nudge(0));
  toggle.addEventListener("click", () => {
    toggle.setAttribute("aria-pressed", String(toggle.getAttribute("aria-pressed") !== "true"));
    show();
  });
  show();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = review?.querySelectorAll("input[type=radio]")[Number(event.key) - 1];
  const key = event.key.toLowerCase();
  if (choice && !choice.matches(":disabled")) { choice.checked = true; choice.focus(); }
  else if (key === "e" && toggle) toggle.click();
  else if ((key === "arrowleft" || key === "arrowright") && evidence) nudge(key === "arrowleft" ? -10 : 10);
  else if (key === "n") document.getElementById("next")?.click();
  else if (key === "w") document.getElementById("back").click();
  else if (key === "enter" && review && !event.target.closest("a, button")) {
    review.requestSubmit((event.shiftKey && document.getElementById("save-next")) || document.getElementById("save"));
  } else return;
  event.preventDefault();
});
