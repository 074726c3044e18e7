/** Elements and canvases: how arrays of numbers become pictures on the page. */

/** Makes an element with attributes and children; text is always text, never markup. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Formats a number with three significant digits, and a true minus sign. */
export function numeral(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  const text = size < 0.0005 || size >= 1e6 ? size.toExponential(1) : size.toFixed(digits);
  return (value < 0 ? "\u2212" : "") + text;
}

/** Keeps a name that is written from right to left from turning the sentence around it. */
export function isolated(name) {
  return `\u2068${name}\u2069`;
}

/** Formats a fraction as a percentage. */
export function percent(fraction) {
  return Number.isFinite(fraction) ? `${(100 * fraction).toFixed(1)} %` : "not a number";
}

// Colours, as red, green and blue, from 0 to the largest value: dark over orange to a pale yellow.
const HEAT = [[18, 14, 20], [110, 32, 48], [222, 96, 48], [255, 196, 110], [255, 248, 220]];
const NEGATIVE = [64, 140, 235], NONE = [30, 28, 32], POSITIVE = [240, 128, 64];

const mix = (from, to, share) => from.map((value, i) => value + (to[i] - value) * share);

/** The colour of a value that is never negative, with 1 as the largest. */
export function heatColour(value) {
  const place = Math.min(1, Math.max(0, value)) * (HEAT.length - 1);
  const below = Math.min(HEAT.length - 2, Math.floor(place));
  return mix(HEAT[below], HEAT[below + 1], place - below);
}

/** The colour of a value between -1, blue, and 1, orange. */
export function signedColour(value) {
  return mix(NONE, value < 0 ? NEGATIVE : POSITIVE, Math.min(1, Math.abs(value)));
}

/** The colour of a grey level between 0 and 1. */
export function greyColour(value) {
  return [255 * value, 255 * value, 255 * value];
}

const asCss = (colour) => `rgb(${colour.map(Math.round).join(" ")})`;

/** The colours of an element that shows a value between -1 and 1: its own, and its text's. */
export function paint(cell, value) {
  const colour = signedColour(value);
  cell.style.background = asCss(colour);
  cell.style.color = colour[0] + colour[1] + colour[2] > 330 ? "#000" : "#fff";
}

/**
 * Draws a map on a canvas, a pixel for each value.
 *
 * @param canvas receives the map's width and height.
 * @param map `{ height, width, data }`.
 * @param colourOf a function from a value, divided by `largest`, to a colour.
 * @param largest the value with the full colour; by default the map's own.
 */
export function drawMap(canvas, { height, width, data }, colourOf = heatColour, largest = null) {
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const most = largest ?? data.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  const image = new ImageData(width, height);
  for (let i = 0; i < data.length; i++) {
    const [r, g, b] = colourOf(most > 0 ? data[i] / most : 0);
    image.data.set([r, g, b, 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Draws the network's image, in grey or colour. */
export function drawImage(canvas, { height, width, channels, data }) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    const at = (c) => data[i * channels + (channels === 1 ? 0 : c)];
    image.data.set([at(0), at(1), at(2), 255], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Draws Grad-CAM over an image: transparent where there is nothing. */
export function drawSaliency(canvas, { height, width, data }) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  data.forEach((value, i) => {
    image.data.set([...heatColour(0.25 + 0.75 * value), 200 * Math.sqrt(value)], 4 * i);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}
