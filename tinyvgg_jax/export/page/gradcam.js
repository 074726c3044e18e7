/** Grad-CAM: where in the image a network found its evidence for a class (arXiv:1610.02391). */

/**
 * Computes Grad-CAM at the last convolution.
 *
 * With its activations A and the gradient G of the class's logit with respect to them, it is
 *
 *     relu(sum over channels c of w[c] * A[y, x, c]),  w[c] = mean over y, x of G[y, x, c].
 *
 * @param layers the network; its last two layers are dense.
 * @param stages as from `forward`.
 * @param label the class.
 * @returns `{ height, width, data }`, divided by its maximum; all 0 if nothing is positive.
 */
export function gradCam(layers, stages, label) {
  const convolution = stages.findLast((stage) => stage.kind === "convolution");
  const { height, width, channels, data } = convolution;
  const weights = gradientSums(layers, stages, label);
  const saliency = new Float32Array(height * width);
  for (let i = 0; i < saliency.length; i++) {
    let sum = 0;
    for (let c = 0; c < channels; c++) sum += weights[c] * data[i * channels + c];
    saliency[i] = Math.max(0, sum);
  }
  const largest = saliency.reduce((a, b) => Math.max(a, b));
  return { height, width, data: largest > 0 ? saliency.map((v) => v / largest) : saliency };
}

/**
 * Computes, for each channel, the sum of the logit's gradient over the last convolution's output.
 *
 * A pooling hands a gradient to the largest of its four values, so the sum over the convolution's
 * output is the sum over the pooled values. Channels of equal mean have weights in the same ratio.
 */
function gradientSums(layers, stages, label) {
  const [dense, logits] = layers.slice(-2);
  const hidden = stages.at(-2).data;
  const pooled = stages.at(-3);
  const inputs = pooled.data.length;
  const gradient = new Float64Array(inputs);
  for (let unit = 0; unit < hidden.length; unit++) {
    // ReLU lets a gradient pass where its output is positive.
    if (hidden[unit] <= 0) continue;
    const weight = logits.kernel[label * hidden.length + unit];
    for (let i = 0; i < inputs; i++) gradient[i] += weight * dense.kernel[unit * inputs + i];
  }
  const sums = new Float64Array(pooled.channels);
  gradient.forEach((value, i) => { sums[i % pooled.channels] += value; });
  return sums;
}
