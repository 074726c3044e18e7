/**
 * Pictures as a network's images: a light garment, trimmed and centred, on black.
 *
 * These are the steps of `tinyvgg_jax/pictures.py`, which says why they are taken, with the same
 * constants. A browser hands out 8 bits of each value, so that pictures of 16 bits, of which only some
 * are used, are darker here. An array of pixels is `{ height, width, channels, data }`, its data a Uint8Array in the
 * order (row, column, channel).
 */

// Canvases have a longest side, which differs between browsers; this one all of them have.
const MOST_PIXELS = 100e6, LONGEST_SIDE = 16384, LEAST_SIDE = 8, DETAIL = 16;
const SAME = 25, ALIKE = 8, DIM = 128, CUT_OUT = 0.05;

/** An error whose message is a sentence for the reader of the page. */
export class PictureError extends Error {}

/**
 * Reads a picture and normalises it for a network.
 *
 * @param blob a file in a format that the browser reads.
 * @param shape `[height, width, channels]` of the network's images.
 * @param fit "garment" to cut a garment out, "crop" to cut the middle out, "pad" to keep all.
 * @param invert "auto", "yes" or "no".
 * @returns `{ pixels, inverted }`.
 * @throws PictureError if the file is no picture, too large or too small, or all alike.
 */
export async function readPicture(blob, shape, fit, invert) {
  const [width, height] = await sizeOf(blob);
  if (Math.max(width, height) > LONGEST_SIDE && width * height <= MOST_PIXELS) {
    throw new PictureError(`A browser reads no side of ${Math.max(width, height).toLocaleString("en")} pixels.`);
  }
  if (width * height > MOST_PIXELS) {
    throw new PictureError(
      `This picture has ${width.toLocaleString("en")} x ${height.toLocaleString("en")} pixels; ` +
      `at most ${MOST_PIXELS.toLocaleString("en")} in all can be read.`);
  }
  if (Math.max(width, height) < LEAST_SIDE) {
    throw new PictureError(`A picture of ${width} x ${height} pixels is too small to show anything.`);
  }
  let bitmap;
  try {
    // The pixels as they are in the file, but upright.
    bitmap = await createImageBitmap(
      blob, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
  } catch {
    throw new PictureError(
      "This picture cannot be read: it is damaged, too large, or of a kind that has no pixels, like SVG.");
  }
  try {
    return preparePicture(bitmap, shape, fit, invert);
  } finally {
    bitmap.close();
  }
}

/** Finds a picture's width and height without decoding all of it. */
function sizeOf(blob) {
  const url = URL.createObjectURL(blob), image = new Image();
  return new Promise((resolve, reject) => {
    image.onload = () => resolve([image.naturalWidth, image.naturalHeight]);
    image.onerror = () => reject(new PictureError("This is no picture that the browser can read."));
    image.src = url;
  }).finally(() => URL.revokeObjectURL(url));
}

/**
 * Normalises what a canvas can draw, like an ImageBitmap, a video or another canvas.
 *
 * @returns `{ pixels, inverted }`, as `readPicture`.
 */
export function preparePicture(source, shape, fit, invert) {
  const side = DETAIL * Math.max(shape[0], shape[1]);
  const colours = shrink(source, side);
  const { pixels, background } = opaque(colours, shape[2] === 1);
  if (fit === "garment") return normalise(pixels, shape, invert, background);
  const [height, width, channels] = shape;
  const levels = Array.from({ length: channels }, (_, c) => background ?? median(border(pixels, c)));
  const fitted = fit === "crop"
    ? resize(middle(pixels, height, width), height, width)
    : placeOn(pixels, height, width, levels);
  if (invert === "yes") fitted.data = fitted.data.map((value) => 255 - value);
  return { pixels: fitted, inverted: invert === "yes" };
}

/** Cuts out the largest part of the middle that has the aspect ratio of the network's images. */
function middle(pixels, height, width) {
  const scale = Math.min(pixels.height / height, pixels.width / width);
  const rows = Math.max(1, roundEven(height * scale)), columns = Math.max(1, roundEven(width * scale));
  const top = (pixels.height - rows) >> 1, left = (pixels.width - columns) >> 1;
  return crop(pixels, [top, top + rows], [left, left + columns]);
}

/** Resizes with antialiasing, without regard to the aspect ratio. */
function resize(pixels, height, width) {
  return resizeHeight(resizeWidth(pixels, width, LANCZOS), height, LANCZOS);
}

/** Reads a picture's pixels, reduced by averaging to at most `side` rows and columns: RGBA. */
function shrink(source, side) {
  const width = source.videoWidth || source.width, height = source.videoHeight || source.height;
  const [newWidth, newHeight] = thumbnailSize(width, height, side);
  // Some rows at a time, because all pixels of a large photo at once would take too much memory.
  const rows = Math.max(1, Math.min(height, Math.floor(2 ** 22 / width)));
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = rows;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const narrow = new Uint8Array(height * newWidth * 4);
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(source, 0, top, width, count, 0, 0, width, count);
    const { data } = context.getImageData(0, 0, width, count);
    premultiply(data);
    narrow.set(resizeWidth({ height: count, width, channels: 4, data }, newWidth, BOX).data,
      top * newWidth * 4);
  }
  const reduced = resizeHeight(
    { height, width: newWidth, channels: 4, data: narrow }, newHeight, BOX);
  unpremultiply(reduced.data);
  return reduced;
}

/** Keeps the aspect ratio of a picture whose longer side is reduced to `side`, as Pillow does. */
function thumbnailSize(width, height, side) {
  if (width <= side && height <= side) return [width, height];
  const aspect = width / height;
  const nearest = (number, error) => {
    const below = Math.floor(number), above = Math.ceil(number);
    return Math.max(1, error(above) < error(below) ? above : below);
  };
  return aspect <= 1
    ? [nearest(side * aspect, (n) => Math.abs(aspect - n / side)), side]
    : [side, nearest(side / aspect, (n) => (n === 0 ? 0 : Math.abs(aspect - side / n)))];
}

function premultiply(data) {
  for (let i = 0; i < data.length; i += 4) {
    const alpha = data[i + 3];
    if (alpha === 255) continue;
    for (let c = 0; c < 3; c++) data[i + c] = Math.round((data[i + c] * alpha) / 255);
  }
}

function unpremultiply(data) {
  for (let i = 0; i < data.length; i += 4) {
    const alpha = data[i + 3];
    if (alpha === 255 || alpha === 0) continue;
    for (let c = 0; c < 3; c++) data[i + c] = Math.min(255, Math.floor((data[i + c] * 255) / alpha));
  }
}

const greyOf = (r, g, b) => (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;

/**
 * Puts the opaque part of a picture on white if that part is dark on average, else on black.
 *
 * @returns `{ pixels, background }`: grey or RGB pixels; the background's level if the picture was
 *   cut out, else null.
 */
function opaque({ height, width, data }, grey) {
  let weight = 0, light = 0, clear = 0;
  for (let i = 0; i < data.length; i += 4) {
    weight += data[i + 3];
    light += greyOf(data[i], data[i + 1], data[i + 2]) * data[i + 3];
    if (data[i + 3] < 16) clear++;
  }
  const level = weight === 0 || light / weight < 128 ? 255 : 0;
  const channels = grey ? 1 : 3, pixels = new Uint8Array(height * width * channels);
  for (let i = 0, p = 0; i < data.length; i += 4) {
    const alpha = data[i + 3] / 255;
    const [r, g, b] = [0, 1, 2].map((c) => Math.round(data[i + c] * alpha + level * (1 - alpha)));
    if (grey) pixels[p++] = greyOf(r, g, b);
    else { pixels[p++] = r; pixels[p++] = g; pixels[p++] = b; }
  }
  const cutOut = clear / (height * width) > CUT_OUT;
  return { pixels: { height, width, channels, data: pixels }, background: cutOut ? level : null };
}

/** Normalises pixels: `pictures.normalise`. */
export function normalise(pixels, [height, width, channels], invert, background = null) {
  const grey = channels === 1;
  const ready = pixels.height === height && pixels.width === width;
  const levels = Array.from({ length: channels }, (_, c) =>
    background ?? (ready ? corner(pixels, c) : median(border(pixels, c))));
  if (grey && !ready) return lightOnBlack(pixels, height, width, invert, levels[0]);
  const inverted = invert === "yes" || (invert === "auto" && grey && levels[0] > 127);
  const fitted = ready ? pixels : placeOn(pixels, height, width, levels);
  if (inverted) fitted.data = fitted.data.map((value) => 255 - value);
  return { pixels: fitted, inverted };
}

/** The second darkest of the four corners. */
function corner({ height, width, channels, data }, channel) {
  const rows = [0, (height - 1) * width];
  const corners = rows.flatMap((row) => [row, row + width - 1].map((i) => data[i * channels + channel]));
  return corners.sort((a, b) => a - b)[1];
}

/** The values of the outermost rows and columns; the corners count twice. */
function border({ height, width, channels, data }, channel = 0) {
  const values = [], at = (y, x) => data[(y * width + x) * channels + channel];
  for (let x = 0; x < width; x++) values.push(at(0, x), at(height - 1, x));
  for (let y = 0; y < height; y++) values.push(at(y, 0), at(y, width - 1));
  return values;
}

function median(values) {
  const sorted = Float64Array.from(values).sort(), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Normalises a grey photo: the garment, cut out and light, on black. */
function lightOnBlack(pixels, height, width, invert, background) {
  const differences = differencesFrom(pixels, background);
  const darker = differences.reduce((a, b) => a + b, 0) < 0;
  const inverted = invert === "auto" ? darker : invert === "yes";
  const inRow = new Float64Array(pixels.height), inColumn = new Float64Array(pixels.width);
  differences.forEach((difference, i) => {
    if (difference === 0) return;
    inRow[Math.floor(i / pixels.width)] += 1 / pixels.width;
    inColumn[i % pixels.width] += 1 / pixels.height;
  });
  const cut = crop(pixels, span(inRow), span(inColumn));
  const fitted = placeOn(cut, height, width, [background]);
  let values = Float64Array.from(fitted.data, (value) => (inverted ? 255 - value : value));
  const ground = inverted ? 255 - background : background;
  if (inverted === darker) {
    values = values.map((value) => (value - ground) * (255 / (255 - ground)));
    const brightest = values.reduce((a, b) => Math.max(a, b));
    if (brightest > 0 && brightest < DIM) values = values.map((value) => value * (255 / brightest));
  }
  fitted.data = Uint8Array.from(values, (v) => Math.round(Math.min(255, Math.max(0, v))));
  return { pixels: fitted, inverted };
}

/** Subtracts the background from grey pixels; the result is 0 where they belong to it. */
function differencesFrom(pixels, background) {
  const { height, width, data } = pixels;
  const radius = Math.max(1, Math.floor(Math.max(height, width) / 64));
  const smooth = Float64Array.from(blur(pixels, radius), (value) => value - background);
  const contrasts = smooth.map(Math.abs);
  const contrast = contrasts.reduce((a, b) => Math.max(a, b));
  if (contrast >= 2 * SAME) {
    return Float64Array.from(data, (value) =>
      Math.abs(value - background) > SAME ? value - background : 0);
  }
  const edge = median(border({ height, width, channels: 1, data: contrasts }));
  const least = Math.max(ALIKE, 2 * edge);
  if (contrast <= least || steepest(smooth, height, width, 2 * radius + 1) <= ALIKE) {
    throw new PictureError("All pixels of this picture are alike.");
  }
  const limit = Math.max(least, contrast / 3);
  return smooth.map((value, i) => (contrasts[i] > limit ? value : 0));
}

/** Averages over squares of 2 * radius + 1 pixels; beyond the border the picture is mirrored. */
function blur({ height, width, data }, radius) {
  const across = averages(data, height, width, radius);
  return transposed(averages(transposed(across, height, width), width, height, radius), width, height);
}

function averages(data, height, width, radius) {
  const result = new Uint8Array(data.length), size = 2 * radius + 1;
  const mirrored = (x) => (x < 0 ? -1 - x : x >= width ? 2 * width - 1 - x : x);
  for (let y = 0; y < height; y++) {
    let sum = 0;
    const at = (x) => data[y * width + Math.min(width - 1, Math.max(0, mirrored(x)))];
    for (let x = -radius; x <= radius; x++) sum += at(x);
    for (let x = 0; x < width; x++) {
      result[y * width + x] = Math.floor(sum / size + 0.5);
      sum += at(x + radius + 1) - at(x - radius);
    }
  }
  return result;
}

function transposed(data, height, width) {
  const result = new Uint8Array(data.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) result[x * height + y] = data[y * width + x];
  }
  return result;
}

/** The largest change over some rows or columns; 0 if there are not as many. */
function steepest(values, height, width, distance) {
  let largest = 0;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const value = values[y * width + x];
      if (y >= distance) largest = Math.max(largest, Math.abs(value - values[(y - distance) * width + x]));
      if (x >= distance) largest = Math.max(largest, Math.abs(value - values[y * width + x - distance]));
    }
  }
  return largest;
}

/** The first row that the garment reaches, and the one behind the last, not counting dust. */
function span(shares) {
  const least = Math.min(0.01, shares.reduce((a, b) => Math.max(a, b)) / 2);
  const busy = (share) => share > least + 1e-12;
  return [shares.findIndex(busy), shares.findLastIndex(busy) + 1];
}

function crop({ width, channels, data }, [top, bottom], [left, right]) {
  const height = bottom - top, length = (right - left) * channels;
  const result = new Uint8Array(height * length);
  for (let y = 0; y < height; y++) {
    const start = ((top + y) * width + left) * channels;
    result.set(data.subarray(start, start + length), y * length);
  }
  return { height, width: right - left, channels, data: result };
}

/** Rounds as Python does: a half to the even neighbour. */
function roundEven(number) {
  const below = Math.floor(number);
  return number - below === 0.5 ? below + (below % 2) : Math.round(number);
}

/** Resizes to fit, keeping the aspect ratio, and centres on the background. */
function placeOn(pixels, height, width, levels) {
  const { channels } = pixels;
  const scale = Math.min(height / pixels.height, width / pixels.width);
  const newHeight = Math.max(1, Math.min(height, roundEven(pixels.height * scale)));
  const newWidth = Math.max(1, Math.min(width, roundEven(pixels.width * scale)));
  const small = resize(pixels, newHeight, newWidth);
  const data = new Uint8Array(height * width * channels);
  data.forEach((_, i) => { data[i] = roundEven(levels[i % channels]); });
  const top = (height - newHeight) >> 1, left = (width - newWidth) >> 1;
  for (let y = 0; y < newHeight; y++) {
    data.set(small.data.subarray(y * newWidth * channels, (y + 1) * newWidth * channels),
      ((top + y) * width + left) * channels);
  }
  return { height, width, channels, data };
}

// Filters of a resampling: a weight by the distance to the centre, and the largest distance.
const BOX = { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) };
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const LANCZOS = { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) };

/** Resizes the rows of an array of pixels; the filter grows with the reduction, as in Pillow. */
function resizeWidth(pixels, newWidth, filter) {
  const { height, width, channels, data } = pixels;
  if (newWidth === width) return pixels;
  const result = new Uint8ClampedArray(height * newWidth * channels);
  const scale = width / newWidth, reduction = Math.max(1, scale);
  const support = filter.support * reduction;
  for (let x = 0; x < newWidth; x++) {
    const centre = (x + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - support + 0.5));
    const last = Math.min(width, Math.floor(centre + support + 0.5));
    const weights = Float64Array.from({ length: last - first }, (_, i) =>
      filter.weight((first + i - centre + 0.5) / reduction));
    const total = weights.reduce((a, b) => a + b);
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let i = first; i < last; i++) {
          sum += weights[i - first] * data[(y * width + i) * channels + c];
        }
        result[(y * newWidth + x) * channels + c] = Math.floor(sum / total + 0.5);
      }
    }
  }
  return { height, width: newWidth, channels, data: result };
}

/** Resizes the columns of an array of pixels: `resizeWidth` with rows and columns exchanged. */
function resizeHeight(pixels, newHeight, filter) {
  return exchanged(resizeWidth(exchanged(pixels), newHeight, filter));
}

function exchanged({ height, width, channels, data }) {
  const result = new Uint8ClampedArray(data.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < channels; c++) {
        result[(x * height + y) * channels + c] = data[(y * width + x) * channels + c];
      }
    }
  }
  return { height: width, width: height, channels, data: result };
}
