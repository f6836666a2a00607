// The page, whatever upscales. An engine has
//   choose() -> {label, key, passes, ...}: what is chosen now; the label is for files' names, the key tells what is as
//     fast as what, passes how often the network runs; null if the choice is not complete
//   upscale(file, choice, format, report, signal) -> {blob, warnings}, or an error whose message is shown;
//     report(null) while others are worked on, report(fraction) as far as it is known

const waiting = [], speeds = {};
let working = false, shownItem = null, follow = true;  // follow: show each image as it is done

const sizeOf = url => new Promise(done => {
  const image = new Image();
  image.onload = () => done([image.naturalWidth, image.naturalHeight]);
  image.onerror = () => done(null);
  image.src = url;
});

function lasting(seconds) {
  const [count, unit] = seconds < 100 ? [seconds, "s"] : seconds < 6000 ? [seconds / 60, "min"] : [seconds / 3600, "h"];
  return `${Math.ceil(count)} ${unit}`;
}

function add(files) {
  const choice = engine.choose();
  if (!choice) return;
  follow = true;
  for (const file of files) {
    const item = {file, choice, format: $("format").value, row: make("li"), stop: new AbortController()};
    item.name = make("button", {type: "button", className: "name", textContent: file.name, disabled: true, onclick: () => { follow = false; show(item); }});
    item.status = make("span", {className: "note", textContent: "Waiting"});
    item.act = make("button", {type: "button", className: "act", textContent: "Cancel", onclick: () => cancel(item)});
    item.row.append(item.name, item.status, item.act);
    $("list").append(item.row);
    waiting.push(item);
  }
  $("empty").hidden = $("list").childElementCount > 0;
  work();
}

async function work() {
  if (working) return;
  working = true;
  for (let item; (item = waiting.shift());) if (!item.stop.signal.aborted) await upscale(item);
  working = false;
}

function cancel(item) {
  item.stop.abort();
  item.act.remove();
  item.status.textContent = "Cancelled";
}

async function upscale(item) {
  item.before = URL.createObjectURL(item.file);
  const size = await sizeOf(item.before), pixels = size && size[0] * size[1] * item.choice.passes;
  if (item.stop.signal.aborted) return;  // meanwhile
  const bar = make("progress", {max: 1});
  let began = performance.now(), fraction = 0;
  item.row.append(bar);
  const seconds = () => (performance.now() - began) / 1000;
  const tick = () => {
    const expected = fraction ? seconds() / fraction : speeds[item.choice.key] * pixels;  // not a number before the first image
    if (expected) bar.value = Math.min(0.97, seconds() / expected);
    const left = expected - seconds();
    item.status.textContent = fraction === null ? "Waiting for images of another window"
      : left > 0 ? `Working, about ${lasting(left)} left` : `Working, ${Math.floor(seconds())} s`;
  };
  const report = now => {
    if (fraction === null) began = performance.now();
    fraction = now;
  };
  tick();
  const timer = setInterval(tick, 500);
  try {
    const {blob, warnings} = await engine.upscale(item.file, item.choice, item.format, report, item.stop.signal);
    const took = seconds(), suffix = `.${blob.type.split("/")[1].replace("jpeg", "jpg")}`;
    item.after = URL.createObjectURL(blob);
    item.size = await sizeOf(item.after);
    if (pixels) speeds[item.choice.key] = took / pixels;
    item.grown = size && item.size ? `${size.join(" × ")} to ${item.size.join(" × ")}` : "";
    item.status.textContent = `Done: ${item.grown && `${item.grown}, `}${took.toFixed(1)} s`;
    for (const warning of warnings) item.row.append(make("p", {className: "warning", textContent: warning}));
    const name = `${item.file.name.replace(/\.[^.]*$/, "")}_${item.choice.label}${suffix}`;
    item.act.replaceWith(make("a", {className: "act", textContent: "Download", href: item.after, download: name}));
    item.name.disabled = false;
    $("said").textContent = `${item.file.name} is done.`;
    if (follow) show(item);
  } catch (error) {
    if (!item.stop.signal.aborted) {
      item.act.remove();
      item.status.className = "bad";
      item.status.textContent = $("said").textContent = error.message;
    }
  } finally {
    clearInterval(timer);
    bar.remove();
  }
}

async function show(item) {
  shownItem = item;
  for (const row of $("list").children) row.classList.toggle("chosen", row === item.row);
  const visible = item.size && await sizeOf(item.before);
  if (shownItem !== item) return;  // another was chosen meanwhile
  $("view").hidden = !visible;
  $("unshown").hidden = Boolean(visible);
  if (!visible) return;
  $("before").src = item.before;
  $("after").src = item.after;
  $("caption").textContent = `${item.file.name}: ${item.grown} pixels`;
  fit();
}

function fit() {
  if (!shownItem?.size) return;
  const [width, height] = shownItem.size, full = $("full").checked;
  const style = $("compare").style;
  $("stage").classList.toggle("full", full);
  style.aspectRatio = `${width} / ${height}`;
  style.width = full ? `${width / devicePixelRatio}px` : `min(100%, ${60 * width / height}vh)`;
}

$("files").onchange = () => { add($("files").files); $("files").value = ""; };
$("at").oninput = () => $("compare").style.setProperty("--at", `${$("at").value}%`);
$("full").onchange = fit;
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, event => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
