/** Where a value of a network comes from: the terms of its sum. */

/** Returns the map of one channel of a stage: `{ height, width, data }`. */
export function mapOf({ height, width, channels, data }, channel) {
  const map = new Float32Array(height * width);
  for (let i = 0; i < map.length; i++) map[i] = data[i * channels + channel];
  return { height, width, data: map };
}

/** Returns the 3x3 patch of a channel around a pixel, row by row; it is 0 outside the stage. */
export function patchOf({ height, width, channels, data }, channel, y, x) {
  return Array.from({ length: 9 }, (_, i) => {
    const row = y - 1 + Math.floor(i / 3), column = x - 1 + (i % 3);
    const inside = row >= 0 && row < height && column >= 0 && column < width;
    return inside ? data[(row * width + column) * channels + channel] : 0;
  });
}

/** Returns the 3x3 kernel between an input and an output of a convolution, row by row. */
export function kernelOf(layer, input, output) {
  return Array.from(
    { length: 9 }, (_, i) => layer.kernel[(output * 9 + i) * layer.inputs + input]);
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const bySize = (a, b) => Math.abs(b.total) - Math.abs(a.total);

/**
 * Splits the map of a convolution's output, before bias and ReLU, by its input channels.
 *
 * @returns for each input channel `{ channel, kernel, map, total }`, where `map` is what it
 *   contributes to each pixel and `total` the sum of that; the largest total first.
 */
export function convolutionSources(input, layer, output) {
  const { height, width, channels } = input;
  return Array.from({ length: channels }, (_, channel) => {
    const kernel = kernelOf(layer, channel, output);
    const data = new Float32Array(height * width);
    let total = 0;
    for (let i = 0; i < data.length; i++) {
      data[i] = dot(patchOf(input, channel, Math.floor(i / width), i % width), kernel);
      total += data[i];
    }
    return { channel, kernel, map: { height, width, data }, total };
  }).sort(bySize);
}

/**
 * Writes a convolution's value at a pixel as a sum over its input channels.
 *
 * @returns `{ terms, bias, sum, value }`: each term is `{ channel, patch, kernel, total }`, the
 *   largest first; `sum` includes the bias, and `value` is max(0, sum).
 */
export function convolutionTerms(input, layer, output, y, x) {
  const terms = Array.from({ length: input.channels }, (_, channel) => {
    const patch = patchOf(input, channel, y, x), kernel = kernelOf(layer, channel, output);
    return { channel, patch, kernel, total: dot(patch, kernel) };
  }).sort(bySize);
  const bias = layer.bias[output];
  const sum = terms.reduce((all, term) => all + term.total, bias);
  return { terms, bias, sum, value: Math.max(0, sum) };
}

/** Returns the four values whose maximum a pooling keeps, and the place of the maximum in them. */
export function poolingTerms({ width, channels, data }, channel, y, x) {
  const values = [0, 1, 2, 3].map(
    (i) => data[((2 * y + (i >> 1)) * width + 2 * x + (i & 1)) * channels + channel]);
  return { values, largest: values.indexOf(Math.max(...values)) };
}

/**
 * Writes a dense layer's value as a sum over its inputs.
 *
 * @returns `{ terms, bias, sum }`: each term is `{ channel, y, x, input, weight, total }`, the
 *   largest first; `sum` includes the bias, before any ReLU.
 */
export function denseTerms({ width, channels, data }, layer, output) {
  const terms = Array.from(data, (input, i) => {
    const weight = layer.kernel[output * data.length + i], pixel = Math.floor(i / channels);
    const place = { channel: i % channels, y: Math.floor(pixel / width), x: pixel % width };
    return { ...place, input, weight, total: input * weight };
  }).sort(bySize);
  const bias = layer.bias[output];
  return { terms, bias, sum: terms.reduce((all, term) => all + term.total, bias) };
}

/**
 * Splits a dense layer's value by its input maps.
 *
 * @returns for each input channel `{ channel, map, total }`, as `convolutionSources` does.
 */
export function denseSources(input, layer, output) {
  const { height, width, channels, data } = input;
  return Array.from({ length: channels }, (_, channel) => {
    const products = new Float32Array(height * width);
    let total = 0;
    for (let i = 0; i < products.length; i++) {
      const place = i * channels + channel;
      products[i] = data[place] * layer.kernel[output * data.length + place];
      total += products[i];
    }
    return { channel, map: { height, width, data: products }, total };
  }).sort(bySize);
}
