/** The worker: it runs the network, so that the page never waits for it. */

// Passes of which the median time is measured, after the browser has compiled the code.
const PASSES = 5;

let layers = [];

onmessage = ({ data }) => {
  if (data.layers) {
    layers = readLayers(data.layers, data.weights, data.bits);
    return;
  }
  if (data.measure) {
    postMessage({ milliseconds: medianTime(data.image) });
    return;
  }
  const stages = forward(layers, data.image);
  postMessage({ stages }, stages.map((stage) => stage.data.buffer));
};

function medianTime(image) {
  const times = Array.from({ length: PASSES }, () => {
    const start = performance.now();
    forward(layers, image);
    return performance.now() - start;
  });
  return times.sort((a, b) => a - b)[PASSES >> 1];
}
