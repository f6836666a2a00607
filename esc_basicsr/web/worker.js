// Runs an exported network on images, beside the page so that it stays alive.

const QUALITY = 0.95;  // of JPEG and WebP
const MARGIN = 2;  // windows around a tile, as `upscale` has them
const MOST_SIDE = 16384;  // of an image that browsers draw, in pixels

let ready = null;  // {ort, session, runsOn}

async function start(runsOn) {
  const [library, binary] = runsOn === "WebGPU" ? ["ort.webgpu.min.js", "asyncify."] : ["ort.wasm.min.js", ""];
  const ort = await import(`./${library}`);
  const at = ending => new URL(`ort-wasm-simd-threaded.${binary}${ending}`, import.meta.url).href;
  ort.env.wasm.wasmPaths = {mjs: at("js"), wasm: at("wasm")};
  const session = await ort.InferenceSession.create("network.onnx", {executionProviders: [runsOn === "WebGPU" ? "webgpu" : "wasm"]});
  postMessage({runsOn});
  return {ort, session, runsOn};
}

async function run(values, height, width) {
  if (!ready) {
    const hasGpu = await navigator.gpu?.requestAdapter().catch(() => null);
    ready = await (hasGpu ? start("WebGPU").catch(() => start("WebAssembly")) : start("WebAssembly"));
  }
  const once = async () => (await ready.session.run({lr: new ready.ort.Tensor("float32", values, [1, 3, height, width])})).sr;
  try {
    return await (await once()).getData();
  } catch (error) {
    if (ready.runsOn !== "WebGPU") throw error;
    ready = await start("WebAssembly");  // the GPU's memory was not enough; the page says what it runs on
    return (await once()).getData();
  }
}

async function pixelsOf(file) {
  const image = await createImageBitmap(file).catch(() => { throw Error("the browser cannot read this image"); });
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  const pixels = () => context.getImageData(0, 0, image.width, image.height);
  context.drawImage(image, 0, 0);
  if (pixels().data.every((value, at) => at % 4 < 3 || value === 255)) return [pixels(), []];
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "white";
  context.fillRect(0, 0, image.width, image.height);
  return [pixels(), [`${file.name}: its transparency became white.`]];
}

// The samples in a part of the image with a border around it, one plane a channel. In the border it goes on as its
// mirror image, as convolutions take what lies there for black.
function samples({data, width, height}, [top, bottom], [left, right], border) {
  const index = (at, size) => {
    at = (at - border + 2 * size * border) % (2 * size);  // not below 0, whatever the size
    return Math.min(at, 2 * size - 1 - at);
  };
  const plane = (bottom - top) * (right - left), values = new Float32Array(3 * plane);
  for (let y = top, to = 0; y < bottom; y++) {
    const row = index(y, height) * width;
    for (let x = left; x < right; x++, to++) {
      const from = (row + index(x, width)) * 4;
      for (let channel = 0; channel < 3; channel++) values[to + plane * channel] = data[from + channel] / 255;
    }
  }
  return values;
}

// Tiles of `side`, each seen with `margin` around it; [from, to] in rows and columns.
function* tiles(height, width, side, margin) {
  const along = length => Array.from({length: Math.ceil(length / side)}, (_, number) => {
    const kept = [number * side, Math.min((number + 1) * side, length)];
    return {kept, seen: [Math.max(kept[0] - margin, 0), Math.min(kept[1] + margin, length)]};
  });
  for (const rows of along(height)) for (const columns of along(width)) yield {rows, columns};
}

async function upscale(image, {scale, window, border, most}, report) {
  const [height, width] = [image.height + 2 * border, image.width + 2 * border];
  const isWhole = height * width <= most;
  const side = isWhole ? Math.max(height, width) : Math.max(Math.floor(Math.sqrt(most) / window) - 2 * MARGIN, 1) * window;
  const parts = [...tiles(height, width, side, MARGIN * window)];
  const out = new ImageData(image.width * scale, image.height * scale);
  out.data.fill(255);
  for (const [number, {rows, columns}] of parts.entries()) {
    const [seenHeight, seenWidth] = [rows, columns].map(({seen}) => seen[1] - seen[0]);
    const sr = await run(samples(image, rows.seen, columns.seen, border), seenHeight, seenWidth);
    const plane = seenHeight * seenWidth * scale ** 2;
    const within = ({kept}, size) => [Math.max(kept[0] - border, 0) * scale, Math.min(kept[1] - border, size) * scale];
    const [[top, bottom], [left, right]] = [within(rows, image.height), within(columns, image.width)];
    for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) {
      const from = (y + (border - rows.seen[0]) * scale) * seenWidth * scale + x + (border - columns.seen[0]) * scale;
      const to = (y * out.width + x) * 4;
      for (let channel = 0; channel < 3; channel++) out.data[to + channel] = sr[from + plane * channel] * 255;  // clamped and rounded
    }
    report((number + 1) / parts.length);
  }
  return out;
}

onmessage = async ({data: {file, type, settings}}) => {
  try {
    const [image, warnings] = await pixelsOf(file);
    if (Math.max(image.width, image.height) * settings.scale > MOST_SIDE) {
      throw Error(`has ${image.width} × ${image.height} pixels, and browsers draw ${MOST_SIDE} to a side at most: make it smaller`);
    }
    const out = await upscale(image, settings, done => postMessage({done}));
    const canvas = new OffscreenCanvas(out.width, out.height);
    canvas.getContext("2d").putImageData(out, 0, 0);
    postMessage({blob: await canvas.convertToBlob({type, quality: QUALITY}), warnings});
  } catch (error) {
    postMessage({error: error.message ?? String(error)});
  }
};
