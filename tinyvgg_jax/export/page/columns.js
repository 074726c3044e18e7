/** The network as columns of maps, from the image on the left to the classes on the right. */

import { mapOf } from "./arithmetic.js";
import { drawMap, element, greyColour, percent } from "./drawing.js";

// Maps of a layer that are shown at first: the most active ones.
const SHOWN = 8;
const SVG = "http://www.w3.org/2000/svg";

/** The columns; one map in them is selected. */
export class Columns {
  /**
   * @param root the element that receives the columns.
   * @param classNames the names of the classes.
   * @param onSelect called with the index of a stage, a channel, and whether by a click or a key.
   */
  constructor(root, classNames, onSelect) {
    this.root = root;
    this.classNames = classNames;
    this.onSelect = onSelect;
    this.columns = [];
    this.selected = null;
    this.links = document.createElementNS(SVG, "svg");
    this.links.setAttribute("class", "links");
    this.links.setAttribute("aria-hidden", "true");
    root.append(this.links);
    root.addEventListener("keydown", (event) => this.#onKey(event));
    new ResizeObserver(() => this.#drawLinks()).observe(root);
  }

  /** Draws the stages of an image; live images keep the order of the maps. */
  update(stages, probabilities, live) {
    if (!this.columns.length) this.columns = stages.map((stage, i) => this.#makeColumn(stage, i));
    this.stages = stages;
    this.probabilities = probabilities;
    this.columns.forEach((column, i) => {
      if (!live || !column.order) column.order = orderOf(stages[i]);
      this.#drawColumn(i);
    });
  }

  /**
   * Marks a map as selected, and links it with its sources.
   *
   * @param sources `[{ channel, total }]` of the stage before, the largest first.
   */
  select(stage, channel, pinned, sources) {
    const before = this.selected;
    this.selected = { stage, channel, pinned };
    this.sources = sources;
    if (before && before.stage !== stage) this.#drawColumn(before.stage);
    this.#drawColumn(stage);
    this.#drawLinks();
  }

  /** Finds the most active map of the last layer of a kind. */
  mostActive(kind) {
    const stage = this.stages.findLastIndex((one) => one.kind === kind);
    return { stage, channel: this.columns[stage].order[0], pinned: false };
  }

  /** Moves the keyboard's focus to the selected map. */
  focus() {
    this.#button(this.selected.stage, this.selected.channel)?.focus();
  }

  #makeColumn(stage, index) {
    const size = stage.height * stage.width > 1 ? ` of ${stage.height}\u00d7${stage.width}` : "";
    const count = `${stage.channels}${stage.kind === "output" ? " classes" : size}`;
    const maps = element("div", { class: "maps" });
    const more = element("button", { type: "button", class: "more" });
    const section = element(
      "section", { class: `column ${stage.kind}`, "aria-label": `${stage.name}: ${count}` },
      element("h3", {}, stage.name), element("p", { class: "faint" }, count), maps, more);
    more.addEventListener("click", () => {
      this.columns[index].all = !this.columns[index].all;
      this.#drawColumn(index);
      this.#drawLinks();
    });
    this.root.append(section);
    return { section, maps, more, order: null, all: stage.kind === "output" };
  }

  #drawColumn(index) {
    const column = this.columns[index], stage = this.stages[index];
    const channels = column.all ? column.order : column.order.slice(0, SHOWN);
    const { selected } = this;
    if (selected?.stage === index && !channels.includes(selected.channel)) {
      channels.push(selected.channel);
    }
    while (column.maps.children.length > channels.length) column.maps.lastChild.remove();
    while (column.maps.children.length < channels.length) column.maps.append(this.#makeMap(index));
    const largest = stage.kind === "dense" ? stage.data.reduce((a, b) => Math.max(a, b)) : null;
    channels.forEach((channel, i) => this.#drawMap(column.maps.children[i], stage, channel, largest));
    column.more.hidden = stage.channels <= SHOWN || stage.kind === "output";
    column.more.textContent = column.all ? "fewer" : `all ${stage.channels}`;
    column.more.setAttribute("aria-label", `${column.more.textContent} of ${stage.name}`);
  }

  #makeMap(index) {
    const button = element("button", { type: "button", class: "map", tabindex: "-1" });
    if (this.stages[index].kind === "output") {
      button.append(element("span", { class: "name" }), element("span", { class: "share" }));
    } else {
      button.append(element("canvas", { "aria-hidden": "true" }));
    }
    const choose = (pinned) => this.onSelect(index, Number(button.dataset.channel), pinned);
    button.addEventListener("pointerenter", (event) => {
      if (event.pointerType === "mouse" && !this.selected?.pinned) choose(false);
    });
    button.addEventListener("focus", () => {
      if (button.matches(":focus-visible")) choose(false);
    });
    button.addEventListener("click", () => {
      const { stage, channel, pinned } = this.selected ?? {};
      const same = stage === index && channel === Number(button.dataset.channel);
      choose(!(same && pinned));
      // On a phone the details cover the lower part of the window.
      if (matchMedia("(max-width: 48rem)").matches) button.scrollIntoView();
    });
    return button;
  }

  #drawMap(button, stage, channel, largest) {
    button.dataset.channel = channel;
    const { selected } = this, index = this.stages.indexOf(stage);
    const own = selected?.stage === index && selected.channel === channel;
    button.setAttribute("aria-pressed", String(own));
    button.classList.toggle("pinned", own && selected.pinned);
    button.tabIndex = own || (!selected && index === 0) ? 0 : -1;
    if (stage.kind === "output") {
      const name = this.classNames[channel], share = percent(this.probabilities[channel]);
      button.firstChild.textContent = name;
      button.lastChild.textContent = share;
      button.setAttribute("aria-label", `${name}: ${share}`);
      return;
    }
    const map = mapOf(stage, channel);
    if (stage.kind === "input") drawMap(button.firstChild, map, greyColour, 1);
    else drawMap(button.firstChild, map, undefined, largest);
    button.setAttribute("aria-label", describeMap(stage, channel, map));
  }

  #button(stage, channel) {
    return this.columns[stage].maps.querySelector(`[data-channel="${channel}"]`);
  }

  /** Arrow keys go up and down in a column, and from column to column. */
  #onKey(event) {
    const moves = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    const move = moves[event.key];
    const column = this.columns.findIndex(({ maps }) => maps.contains(event.target));
    if (!move || column < 0) return;
    event.preventDefault();
    const row = [...this.columns[column].maps.children].indexOf(event.target);
    const to = this.columns[column + move[0]]?.maps.children;
    to?.[Math.min(to.length - 1, Math.max(0, row + move[1]))].focus();
  }

  /** Draws a curve from each source that is shown to the selected map. */
  #drawLinks() {
    this.links.replaceChildren();
    if (!this.selected || !this.sources?.length) return;
    const target = this.#button(this.selected.stage, this.selected.channel);
    if (!target) return;
    const frame = this.root.getBoundingClientRect();
    const left = this.root.scrollLeft - frame.left, top = this.root.scrollTop - frame.top;
    this.links.setAttribute("width", this.root.scrollWidth);
    this.links.setAttribute("height", this.root.scrollHeight);
    const end = target.getBoundingClientRect();
    const largest = Math.abs(this.sources[0].total) || 1;
    for (const { channel, total } of this.sources) {
      const start = this.#button(this.selected.stage - 1, channel)?.getBoundingClientRect();
      if (!start) continue;
      const [x0, y0] = [start.right + left, start.top + start.height / 2 + top];
      const [x1, y1] = [end.left + left, end.top + end.height / 2 + top];
      const middle = (x0 + x1) / 2;
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("d", `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}`);
      path.setAttribute("class", total < 0 ? "negative" : "positive");
      path.setAttribute("stroke-width", (0.75 + (3 * Math.abs(total)) / largest).toFixed(2));
      this.links.append(path);
    }
  }
}

/** Orders the channels of a layer by their mean activation; images and classes keep their order. */
function orderOf({ kind, channels, data }) {
  const order = Array.from({ length: channels }, (_, channel) => channel);
  if (kind === "input" || kind === "output") return order;
  const sums = new Float64Array(channels);
  data.forEach((value, i) => { sums[i % channels] += value; });
  return order.sort((a, b) => sums[b] - sums[a]);
}

/** Names a map, and says how active it is, for those who do not see it. */
export function describeMap(stage, channel, map) {
  const largest = map.data.reduce((a, b) => Math.max(a, b));
  const mean = map.data.reduce((a, b) => a + b) / map.data.length;
  const what = stage.kind === "dense" ? "unit" : "map";
  const active = map.data.length > 1 ? `mean ${mean.toFixed(3)}, maximum ${largest.toFixed(2)}` : largest.toFixed(2);
  return `${stage.name}, ${what} ${channel + 1} of ${stage.channels}: ${active}`;
}
