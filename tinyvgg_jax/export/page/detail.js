/** The details of the selected map: its sources, and the arithmetic at one of its pixels. */

import {
  convolutionSources, convolutionTerms, denseSources, denseTerms, mapOf, poolingTerms,
} from "./arithmetic.js";
import { describeMap } from "./columns.js";
import { drawMap, element, greyColour, numeral, paint, percent, signedColour } from "./drawing.js";

// Sources that are shown of a map, and terms that are written out of a sum.
const SOURCES = 6, TERMS = 4;

/**
 * Lists where a map comes from.
 *
 * @param layers the network.
 * @param stages as from `forward`.
 * @returns `[{ channel, total, map, kernel }]` in the stage before, the largest total first.
 */
export function sourcesOf(layers, stages, index, channel) {
  const stage = stages[index], input = stages[index - 1];
  if (stage.kind === "input") return [];
  if (stage.kind === "pooling") return [{ channel, total: 1, map: mapOf(input, channel) }];
  const layer = layerOf(layers, stage);
  const split = stage.kind === "convolution" ? convolutionSources : denseSources;
  return split(input, layer, channel);
}

const layerOf = (layers, stage) => layers.find((layer) => layer.name === stage.name);

/** The panel of details. */
export class Detail {
  /**
   * @param layers the network.
   * @param classNames the names of the classes.
   * @param onSelect called with a stage and a channel when a source is chosen.
   */
  constructor(layers, classNames, onSelect) {
    this.layers = layers;
    this.classNames = classNames;
    this.onSelect = onSelect;
    this.title = document.getElementById("detail-title");
    this.canvas = document.getElementById("map");
    this.marker = document.getElementById("marker");
    this.sources = document.getElementById("sources");
    this.sum = document.getElementById("sum");
    this.pixel = null;
    this.canvas.addEventListener("pointermove", (event) => this.#onPointer(event));
    this.canvas.addEventListener("pointerdown", (event) => this.#onPointer(event));
    this.canvas.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Shows a map; a pixel that was chosen stays chosen while the map is the same. */
  show(stages, index, channel, sources, probabilities) {
    const same = this.index === index && this.channel === channel;
    Object.assign(this, { stages, index, channel, probabilities });
    const stage = stages[index], map = mapOf(stage, channel);
    this.map = map;
    const name = stage.kind === "output" ? this.classNames[channel] : `${channel + 1}`;
    this.title.textContent = {
      input: `The image${stage.channels > 1 ? `, ${["red", "green", "blue"][channel] ?? name}` : ""}`,
      convolution: `${stage.name}, map ${name} of ${stage.channels}`,
      pooling: `${stage.name}, map ${name} of ${stage.channels}`,
      dense: `${stage.name}, unit ${name} of ${stage.channels}`,
      output: `${name}`,
    }[stage.kind];
    const wide = map.data.length > 1;
    this.canvas.parentElement.hidden = !wide;
    if (wide) drawMap(this.canvas, map, stage.kind === "input" ? greyColour : undefined,
      stage.kind === "input" ? 1 : null);
    this.canvas.setAttribute("aria-label",
      `${describeMap(stage, channel, map)}. The arrow keys choose a pixel, Escape goes back.`);
    if (!same || !this.pixel) this.pixel = brightest(map);
    this.#drawSources(sources);
    this.#drawPixel();
  }

  /** Moves the keyboard's focus here. */
  focus() {
    (this.canvas.parentElement.hidden ? this.title : this.canvas).focus();
  }

  #onPointer(event) {
    const box = this.canvas.getBoundingClientRect();
    const at = (offset, size, count) =>
      Math.min(count - 1, Math.max(0, Math.floor((offset / size) * count)));
    this.pixel = {
      y: at(event.clientY - box.top, box.height, this.map.height),
      x: at(event.clientX - box.left, box.width, this.map.width),
    };
    this.#drawPixel();
  }

  #onKey(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const within = (value, count) => Math.min(count - 1, Math.max(0, value));
    this.pixel = {
      y: within(this.pixel.y + move[0], this.map.height),
      x: within(this.pixel.x + move[1], this.map.width),
    };
    this.#drawPixel();
  }

  #drawSources(sources) {
    const stage = this.stages[this.index], input = this.stages[this.index - 1];
    if (!["convolution", "dense"].includes(stage.kind)) {
      this.sources.replaceChildren();
      return;
    }
    const shown = sources.slice(0, SOURCES);
    const largest = shown.reduce(
      (all, { map }) => map.data.reduce((a, b) => Math.max(a, Math.abs(b)), all), 0);
    const rows = shown.map((source) => this.#sourceRow(input, source, largest));
    const rest = sources.length - shown.length;
    const caption = stage.kind === "convolution"
      ? "Map before, kernel, what it adds to this map before ReLU, and the sum of that over all pixels"
      : "Map before, what it adds to this unit before ReLU, and the sum of that over all pixels";
    this.sources.replaceChildren(
      element("h3", {}, "Where it comes from"),
      element("p", { class: "faint" }, `${caption}${rest > 0 ? `; the largest ${shown.length} of ${sources.length}` : ""}.`),
      ...rows);
  }

  #sourceRow(input, { channel, kernel, map, total }, largest) {
    const before = element("canvas", { "aria-hidden": "true" });
    const picture = mapOf(input, channel);
    if (input.kind === "input") drawMap(before, picture, greyColour, 1);
    else drawMap(before, picture);
    const button = element(
      "button",
      { type: "button", class: "source",
        "aria-label": `${input.name}, map ${channel + 1}, adds ${numeral(total)}` },
      before);
    button.addEventListener("click", () => this.onSelect(this.index - 1, channel));
    const added = element("canvas", { "aria-hidden": "true" });
    drawMap(added, map, signedColour, largest);
    const parts = kernel ? [sign("\u2217"), square(kernel, "kernel"), sign("=")] : [sign("\u2192")];
    return element(
      "div", { class: "row" }, button, ...parts, added, element("span", { class: "total" }, numeral(total)));
  }

  #drawPixel() {
    const { y, x } = this.pixel, { height, width } = this.map;
    Object.assign(this.marker.style, {
      left: `${(100 * x) / width}%`, top: `${(100 * y) / height}%`,
      width: `${100 / width}%`, height: `${100 / height}%`,
    });
    const stage = this.stages[this.index];
    this.sum.replaceChildren(...{
      input: () => this.#inputValue(),
      convolution: () => this.#convolutionSum(),
      pooling: () => this.#poolingMaximum(),
      dense: () => this.#denseSum(),
      output: () => this.#outputSum(),
    }[stage.kind]());
  }

  #place() {
    return `Row ${this.pixel.y + 1}, column ${this.pixel.x + 1}`;
  }

  #inputValue() {
    const value = this.map.data[this.pixel.y * this.map.width + this.pixel.x];
    return [sentence(`${this.#place()}: level ${Math.round(255 * value)} of 255 is ${numeral(value)}.`)];
  }

  #convolutionSum() {
    const { stages, index, channel, pixel } = this, input = stages[index - 1];
    const { terms, bias, sum, value } = convolutionTerms(
      input, layerOf(this.layers, stages[index]), channel, pixel.y, pixel.x);
    const written = terms.slice(0, TERMS);
    const rows = written.map((term) => element(
      "div", { class: "row" },
      element("span", { class: "term" }, term.channel + 1), square(term.patch, "patch"),
      sign("\u00b7"), square(term.kernel, "kernel"), sign("="),
      element("span", { class: "total" }, numeral(term.total))));
    return [
      sentence(`${this.#place()}: ${sumText(terms, written, bias, sum)}; ReLU gives ${numeral(value)}.`),
      element("p", { class: "faint" }, "Each 3\u00d73 patch of the maps before, times the kernel:"),
      ...rows,
    ];
  }

  #poolingMaximum() {
    const { y, x } = this.pixel;
    const { values, largest } = poolingTerms(this.stages[this.index - 1], this.channel, y, x);
    return [
      sentence(`${this.#place()}: the largest of ${values.map(numeral).join(", ")} is ${numeral(values[largest])}.`),
      square(values, "four values", 2, largest),
    ];
  }

  #denseSum() {
    const { stages, index, channel } = this, input = stages[index - 1];
    const { terms, bias, sum } = denseTerms(input, layerOf(this.layers, stages[index]), channel);
    const written = terms.slice(0, 2 * TERMS);
    return [
      sentence(`${sumText(terms, written, bias, sum)}; ReLU gives ${numeral(Math.max(0, sum))}.`),
      products(written, ({ channel: from, y, x }) => `${input.name} ${from + 1} at ${y + 1}, ${x + 1}`),
    ];
  }

  #outputSum() {
    const { stages, index, channel, probabilities } = this, input = stages[index - 1];
    const { terms, bias, sum } = denseTerms(input, layerOf(this.layers, stages[index]), channel);
    const written = terms.slice(0, 2 * TERMS), logits = stages[index].data;
    const largest = logits.reduce((a, b) => Math.max(a, b));
    const power = (logit) => Math.exp(logit - largest);
    const all = logits.reduce((sum, logit) => sum + power(logit), 0);
    return [
      sentence(`Logit: ${sumText(terms, written, bias, sum)}.`),
      sentence(`Softmax: exp(${numeral(logits[channel])} \u2212 ${numeral(largest)}) / ${numeral(all)} = ` +
        `${percent(probabilities[channel])}. The largest logit is subtracted from each, and the divisor ` +
        "is the sum of exp over all classes."),
      products(written, ({ channel: from }) => `${input.name} ${from + 1}`),
    ];
  }
}

const sign = (text) => element("span", { class: "sign", "aria-hidden": "true" }, text);
const sentence = (text) => element("p", {}, text);

/** Writes a sum: the terms that are written out, the others together, the bias, and the result. */
function sumText(terms, written, bias, sum) {
  const parts = written.map(({ total }) => total);
  const others = terms.slice(written.length);
  const rest = others.reduce((all, { total }) => all + total, 0);
  const signed = (value, i) => {
    if (i === 0) return numeral(value);
    return value < 0 ? `\u2212 ${numeral(-value)}` : `+ ${numeral(value)}`;
  };
  const tail = others.length ? ` ${signed(rest, 1)} (${others.length} other${others.length > 1 ? "s" : ""})` : "";
  return `${parts.map(signed).join(" ")}${tail} ${signed(bias, 1)} (bias) = ${numeral(sum)}`;
}

/** A table of products: input, weight, and their product. */
function products(terms, nameOf) {
  const rows = terms.map((term) => element(
    "tr", {}, element("th", { scope: "row" }, nameOf(term)),
    ...[term.input, term.weight, term.total].map((value) => element("td", {}, numeral(value)))));
  const head = ["Input", "Value", "Weight", "Product"].map((name) => element("th", { scope: "col" }, name));
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
}

/** A small square table of numbers, coloured by their sign and size. */
function square(values, name, side = 3, marked = -1) {
  const largest = values.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
  const rows = Array.from({ length: side }, (_, y) => {
    const cells = values.slice(y * side, (y + 1) * side).map((value, x) => {
      const cell = element("td", { class: y * side + x === marked && "marked" }, numeral(value));
      paint(cell, value / largest);
      return cell;
    });
    return element("tr", {}, ...cells);
  });
  return element("table", { class: "square", "aria-label": name }, element("tbody", {}, ...rows));
}

/** The place of a map's largest value. */
function brightest({ width, data }) {
  const at = data.reduce((best, value, i) => (value > data[best] ? i : best), 0);
  return { y: Math.floor(at / width), x: at % width };
}
