/** The worker: it runs the network, so that the page never waits for it. */

let layers = [];

onmessage = ({ data }) => {
  if (data.layers) {
    layers = data.layers;
    return;
  }
  const start = performance.now();
  const stages = forward(layers, data.image);
  const milliseconds = performance.now() - start;
  postMessage({ stages, milliseconds }, stages.map((stage) => stage.data.buffer));
};
