// The engine of the page without a server: a worker runs the network by onnxruntime-web.

const what = `${settings.title} makes images ${settings.scale} times as large`;
const isFile = location.protocol === "file:";
let worker = null;  // made for the first image, and anew after one was cancelled

const engine = {
  choose: () => isFile ? null : {label: `x${settings.scale}`, key: settings.title, passes: 1},

  upscale(file, choice, format, report, signal) {
    worker ??= new Worker("worker.js", {type: "module"});
    return new Promise((resolve, reject) => {
      const end = error => {
        worker.terminate();
        worker = null;
        reject(error);
      };
      signal.onabort = () => end(Error("cancelled"));
      worker.onerror = event => end(Error(`The network cannot be run: ${event.message ?? "worker.js is not there"}.`));
      worker.onmessage = ({data}) => {
        if (data.runsOn) $("runs-on").textContent = `${what}, on ${data.runsOn}.`;
        else if (data.error) reject(Error(`${file.name}: ${data.error}`));
        else if (data.blob) resolve(data);
        else report(data.done);
      };
      worker.postMessage({file, type: typeOf(file, format), settings});
    }).finally(() => { signal.onabort = null; });
  },
};

// What the browser writes; other images become PNG.
function typeOf(file, format) {
  const types = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"};
  return types[format] ?? (Object.values(types).includes(file.type) ? file.type : "image/png");
}

$("runs-on").classList.toggle("bad", isFile);
$("runs-on").textContent = isFile
  ? "Browsers run no network from a file: put this folder on a web server, or call python -m http.server in it."
  : `${what}.`;
