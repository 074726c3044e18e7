/** Facts about the network: its layers, its accuracy, and the test images that it confuses. */

import { element, percent } from "./drawing.js";

/** Fills the section of facts. */
export function showFacts(card) {
  showLayers(card.layers);
  const sentences = [];
  for (const [split, accuracy] of Object.entries(card.accuracies)) {
    sentences.push(`${percent(accuracy)} on ${split}`);
  }
  const when = card.step == null ? "" : `, after ${card.step.toLocaleString("en")} optimizer steps`;
  document.getElementById("accuracies").textContent =
    `Accuracy of these parameters${when}: ${sentences.join(", ")}.`;
  showConfusion(card.confusion, card.class_names);
}

function showLayers(layers) {
  const count = (number) => number.toLocaleString("en");
  const row = (cells, tag = "td") => element(
    "tr", {}, element("th", { scope: "row" }, cells[0]), ...cells.slice(1).map((cell) => element(tag, {}, cell)));
  const total = (key) => layers.reduce((sum, layer) => sum + layer[key], 0);
  document.getElementById("layers").append(
    ...layers.map((layer) => row([
      layer.name, layer.output.join("\u00d7"), count(layer.parameters), count(layer.multiply_adds)])),
    row(["all", "", count(total("parameters")), count(total("multiply_adds"))]));
}

function showConfusion(counts, names) {
  const table = document.getElementById("confusion");
  const head = element("tr", {}, element("td"), ...names.map((name) =>
    element("th", { scope: "col" }, element("span", {}, name))));
  const rows = counts.map((row, truth) => {
    const all = row.reduce((a, b) => a + b) || 1;
    const cells = row.map((count, predicted) => {
      const title = `${names[truth]}, predicted as ${names[predicted]}: ${count} of ${all}`;
      const cell = element("td", { title }, count ? String(count) : "");
      if (count) {
        cell.style.setProperty("--shade", (count / all > 0.55 ? 1 : 0.08 + (0.5 * count) / all).toFixed(2));
        cell.className = count / all > 0.55 ? "shaded deep" : "shaded";
      }
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row" }, names[truth]), ...cells);
  });
  table.append(element("thead", {}, head), element("tbody", {}, ...rows));
}
