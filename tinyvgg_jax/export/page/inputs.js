/** The ways of giving the network an image: examples, files, the camera, and drawing. */

import { drawImage, element, isolated } from "./drawing.js";
import { PictureError, preparePicture, readPicture } from "./pictures.js";

// The width of a line on the pad, in the pad's pixels.
const PEN = 22;

/**
 * Connects the inputs of the page.
 *
 * @param card what the page knows about the network.
 * @param examples `[{ pixels, label, predicted }]`, images of the test split.
 * @param onImage called with the network's image and `{ title, live, inverted, truth }`.
 * @param onProblem called with a sentence if a picture cannot be used.
 */
export function connectInputs(card, examples, onImage, onProblem) {
  const invert = document.getElementById("invert");
  // What is done once more when the choice of inversion changes; the latest choice alone counts.
  let again = () => {};
  const stopLive = connectLive(card, invert, onImage, onProblem, (repeat) => { again = repeat; });

  async function take(blob, title) {
    stopLive();
    release();
    const repeat = () => take(blob, title);
    again = repeat;
    try {
      const { pixels, inverted } = await readPicture(blob, card.image_shape, card.fit, invert.value);
      if (again === repeat) onImage(pixels, { title, inverted });
    } catch (error) {
      if (!(error instanceof PictureError)) throw error;
      if (again === repeat) onProblem(error.message);
    }
  }

  showExamples(card, examples, (example, title) => {
    stopLive();
    again = () => {};
    onImage(example.pixels, { title, truth: example.label });
  });
  invert.addEventListener("change", () => again());

  const chooser = document.getElementById("file");
  chooser.addEventListener("change", () => {
    if (chooser.files.length) take(chooser.files[0], chooser.files[0].name);
    chooser.value = "";
  });
  document.getElementById("choose").addEventListener("click", () => chooser.click());
  connectDropAndPaste(take, onProblem);
}

/** Shows the images of the test split as a strip of buttons; the first one is pressed. */
function showExamples(card, examples, onChosen) {
  const strip = document.getElementById("examples");
  const buttons = examples.map((example, i) => {
    const canvas = element("canvas", { "aria-hidden": "true" });
    drawImage(canvas, example.pixels);
    const right = example.label === example.predicted;
    const truth = isolated(card.class_names[example.label]);
    const predicted = isolated(card.class_names[example.predicted]);
    const title = right ? `${truth}, predicted correctly` : `${truth}, predicted as ${predicted}`;
    const button = element(
      "button",
      { type: "button", class: right ? "example" : "example wrong", title,
        "aria-label": `Test image ${i + 1}: ${title}`, "aria-pressed": "false" },
      canvas);
    button.addEventListener("click", () => {
      release();
      button.setAttribute("aria-pressed", "true");
      onChosen(example, `Test image ${i + 1}: ${title}`);
    });
    return button;
  });
  strip.append(...buttons);
  connectArrows(strip, buttons);
  buttons[0]?.click();
}

/** Lets the arrow keys go along the strip, which is a single stop for the Tab key. */
function connectArrows(strip, buttons) {
  buttons.forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
  strip.addEventListener("focusin", ({ target }) => {
    for (const button of buttons) button.tabIndex = button === target ? 0 : -1;
  });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    buttons[buttons.indexOf(event.target) + step]?.focus();
  });
}

function release() {
  for (const pressed of document.querySelectorAll("#examples [aria-pressed=true]")) {
    pressed.setAttribute("aria-pressed", "false");
  }
}

/** Takes pictures that are dropped on the page or pasted into it. */
function connectDropAndPaste(take, onProblem) {
  const body = document.body;
  const first = (files) => {
    if (files.length) take(files[0], files[0].name || "A pasted picture");
    else onProblem("There is no picture in this. Drop a picture's file.");
  };
  body.addEventListener("dragover", (event) => {
    event.preventDefault();
    body.classList.add("dropping");
  });
  body.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) body.classList.remove("dropping");
  });
  body.addEventListener("drop", (event) => {
    event.preventDefault();
    body.classList.remove("dropping");
    first(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => first(event.clipboardData.files));
}

/**
 * Connects the camera and the drawing pad, of which at most one is open.
 *
 * @param onOpen called with what is done once more when the choice of inversion changes.
 * @returns a function that closes them.
 */
function connectLive(card, invert, onImage, onProblem, onOpen) {
  const camera = document.getElementById("camera"), draw = document.getElementById("draw");
  const video = document.getElementById("video"), pad = document.getElementById("pad");
  const clear = document.getElementById("clear");
  let stream = null, opened = 0;

  function close() {
    opened++;
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    video.srcObject = null;
    for (const part of [video, pad, clear]) part.hidden = true;
    for (const button of [camera, draw]) button.setAttribute("aria-pressed", "false");
  }

  function use(source, title) {
    try {
      const { pixels, inverted } = preparePicture(source, card.image_shape, card.fit, invert.value);
      onImage(pixels, { title, inverted, live: true });
    } catch (error) {
      if (!(error instanceof PictureError)) throw error;
      onProblem(error.message);
    }
  }

  async function openCamera() {
    const own = opened;
    camera.setAttribute("aria-pressed", "true");
    let found;
    try {
      found = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch {
      if (own !== opened) return;
      close();
      onProblem("The camera cannot be used: there is none, or the browser was not allowed to.");
      return;
    }
    // Something else may have been chosen while the browser asked for permission.
    if (own !== opened) {
      found.getTracks().forEach((track) => track.stop());
      return;
    }
    stream = found;
    video.srcObject = stream;
    video.hidden = false;
    await video.play();
    const mine = stream;
    const frame = () => {
      if (stream !== mine) return;
      use(video, "The camera");
      setTimeout(frame, 150);
    };
    frame();
  }

  camera.hidden = !navigator.mediaDevices?.getUserMedia;
  camera.addEventListener("click", () => {
    const open = camera.getAttribute("aria-pressed") === "true";
    close();
    release();
    onOpen(() => {});
    if (!open) openCamera();
  });
  draw.addEventListener("click", () => {
    const open = !pad.hidden;
    close();
    onOpen(() => {});
    if (open) return;
    pad.hidden = clear.hidden = false;
    draw.setAttribute("aria-pressed", "true");
  });
  connectPad(pad, clear, () => {
    release();
    onOpen(() => use(pad, "A drawing"));
    use(pad, "A drawing");
  });
  return close;
}

/** Lets the pointer draw white lines on the black pad. */
function connectPad(pad, clear, onDrawn) {
  const context = pad.getContext("2d", { willReadFrequently: true });
  const wipe = () => {
    context.fillStyle = "#000";
    context.fillRect(0, 0, pad.width, pad.height);
  };
  wipe();
  Object.assign(
    context, { strokeStyle: "#fff", lineWidth: PEN, lineCap: "round", lineJoin: "round" });
  let last = null;
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) * pad.width) / box.width,
      ((event.clientY - box.top) * pad.height) / box.height];
  };
  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    last = place(event);
    // A tap leaves a disc: not every browser draws a line that has no length.
    context.fillStyle = "#fff";
    context.beginPath();
    context.arc(...last, PEN / 2, 0, 2 * Math.PI);
    context.fill();
    onDrawn();
  });
  pad.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = place(event);
    context.beginPath();
    context.moveTo(...last);
    context.lineTo(...next);
    context.stroke();
    last = next;
    onDrawn();
  });
  for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => { last = null; });
  clear.addEventListener("click", () => {
    wipe();
    onDrawn();
  });
}
