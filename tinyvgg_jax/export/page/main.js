/** The page: it reads the network from itself, and connects inputs, columns, details and facts. */

import { Columns } from "./columns.js";
import { Detail, sourcesOf } from "./detail.js";
import { drawImage, drawSaliency, element, isolated, percent } from "./drawing.js";
import { showFacts } from "./facts.js";
import { gradCam } from "./gradcam.js";
import { connectInputs } from "./inputs.js";
import { readLayers, softmax } from "./network.js";

// Bars of the most probable classes.
const BARS = 10;

const textOf = (id) => document.getElementById(id).textContent.trim();

/** Decodes base64, in a plain loop, since there are millions of bytes. */
function bytesOf(id) {
  const letters = atob(textOf(id)), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

const card = JSON.parse(textOf("card"));
const weights = bytesOf("weights");
const layers = readLayers(card.layers, weights, card.bits);
const worker = new Worker(URL.createObjectURL(new Blob([textOf("worker")], { type: "text/javascript" })));
worker.postMessage({ layers: card.layers, weights, bits: card.bits });

// The image that was asked for last, the answer to the one before it, and what the reader looks at.
let waiting = null, busy = false, answer = null, saliencyClass = null;

const columns = new Columns(document.getElementById("columns"), card.class_names, select);
const detail = new Detail(layers, card.class_names, (stage, channel) => {
  select(stage, channel, true);
  detail.focus();
});

/** Asks the worker for an answer; of several images in a hurry only the last one is computed. */
function classify(pixels, about) {
  say("");
  waiting = { pixels, about };
  if (!busy) send();
}

function send() {
  const { pixels, about } = waiting;
  waiting = null;
  busy = true;
  const { height, width, channels } = pixels;
  const data = Float32Array.from(pixels.data, (value) => value / 255);
  const image = { name: "input", kind: "input", height, width, channels, data };
  worker.onmessage = ({ data: { stages, milliseconds } }) => {
    busy = false;
    if (milliseconds !== undefined) {
      document.getElementById("time").textContent =
        `${milliseconds.toFixed(1)} ms an image in this browser, with all its maps.`;
    } else {
      const first = answer === null;
      answer = { pixels, about, stages, probabilities: softmax(stages.at(-1).data) };
      show(answer);
      if (first) measure(image);
    }
    if (waiting && !busy) send();
  };
  worker.postMessage({ image });
}

/** Measures the time of the network, once, when the first answer is shown. */
function measure(image) {
  busy = true;
  worker.postMessage({ image, measure: true });
}

worker.onerror = () => say("This browser cannot run the network: it allows no worker here.");

function show({ pixels, about, stages, probabilities }) {
  drawImage(document.getElementById("image"), pixels);
  const best = probabilities.indexOf(Math.max(...probabilities));
  const { title, truth, inverted, live } = about;
  // What is read aloud must not change with every image of the camera.
  for (const id of ["answer", "sum"]) {
    document.getElementById(id).setAttribute("aria-live", live ? "off" : "polite");
  }
  const verdict = truth == null ? "" : truth === best ? ", correctly" : `, but it is ${isolated(card.class_names[truth])}`;
  document.getElementById("answer").textContent =
    best < 0 ? "The network's outputs are not numbers."
      : `${isolated(card.class_names[best])}, ${percent(probabilities[best])}${verdict}`;
  document.getElementById("about").textContent = `${title}${inverted ? ", inverted" : ""}`;
  showBars(probabilities, truth);
  showSaliency();
  columns.update(stages, probabilities, about.live);
  const { stage, channel, pinned } = columns.selected ?? columns.mostActive("convolution");
  select(stage, channel, pinned);
}

function showBars(probabilities, truth) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const rows = order.slice(0, BARS).map((label) => {
    const bar = element("span", { class: "bar", "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = `${100 * probabilities[label]}%`;
    const name = `${card.class_names[label]}${label === truth ? " (true)" : ""}`;
    return element("li", {}, element("span", { class: "name" }, name), bar,
      element("span", { class: "share" }, percent(probabilities[label])));
  });
  document.getElementById("bars").replaceChildren(...rows);
}

/** Draws Grad-CAM over the image: for the most probable class, unless another one is chosen. */
function showSaliency() {
  const canvas = document.getElementById("saliency");
  canvas.hidden = !document.getElementById("grad-cam").checked;
  if (canvas.hidden || !answer) return;
  const { stages, probabilities } = answer;
  const label = saliencyClass ?? probabilities.indexOf(Math.max(...probabilities));
  const saliency = gradCam(layers, stages, label);
  drawSaliency(canvas, saliency);
  // Pooling leaves out the last row and column of an odd size, so the map may cover less.
  const pixels = 2 ** (layers.filter((layer) => layer.pool).length - 1);
  canvas.style.width = `${(100 * pixels * saliency.width) / stages[0].width}%`;
  canvas.style.height = `${(100 * pixels * saliency.height) / stages[0].height}%`;
}

function select(stage, channel, pinned) {
  const { stages, probabilities } = answer;
  const sources = sourcesOf(layers, stages, stage, channel);
  columns.select(stage, channel, pinned, sources);
  detail.show(stages, stage, channel, sources, probabilities);
  document.body.classList.toggle("pinned", Boolean(pinned));
}

/** Lets go of the map that was kept, and goes back to it. */
function leave() {
  const { stage, channel } = columns.selected;
  select(stage, channel, false);
  columns.focus();
}

function say(problem) {
  document.getElementById("problem").textContent = problem;
}

function connectSaliency() {
  const chooser = document.getElementById("saliency-class");
  chooser.append(...card.class_names.map((name, label) => element("option", { value: label }, name)));
  chooser.addEventListener("change", () => {
    saliencyClass = chooser.value === "" ? null : Number(chooser.value);
    document.getElementById("grad-cam").checked = true;
    showSaliency();
  });
  document.getElementById("grad-cam").addEventListener("change", showSaliency);
}

/** Splits the test images that the page brings. */
function examplesOf({ image_shape: [height, width, channels], examples }) {
  const bytes = bytesOf("examples-data"), size = height * width * channels;
  return examples.map((example, i) => ({
    ...example,
    pixels: { height, width, channels, data: bytes.slice(i * size, (i + 1) * size) },
  }));
}

// Enter on a map goes to its details, and the Escape key back.
document.getElementById("columns").addEventListener("click", (event) => {
  // A click of the keyboard has no position.
  if (event.detail === 0 && event.target.closest(".map")) detail.focus();
});
document.getElementById("close").addEventListener("click", leave);
document.addEventListener("keydown", (event) => {
  const within = document.getElementById("detail").contains(event.target);
  if (event.key === "Escape" && (within || columns.selected?.pinned)) leave();
});
connectSaliency();
showFacts(card);
connectInputs(card, examplesOf(card), classify, say);
