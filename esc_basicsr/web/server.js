// The engine of the page that a server on this computer shows: images go to it and come back.

const engine = {
  choose() {
    const isOther = !$("size").hidden;
    if (isOther && !$("size").reportValidity()) return null;
    const size = isOther ? writtenSize() : "";
    const network = settings.networks.find(network => network.name === $("network").value);
    const label = !size ? `x${network.scale}` : size.includes("x") ? size : `x${size}`;
    const ensemble = $("ensemble").checked ? "1" : "";
    return {network: network.name, size, ensemble, label, key: network.name, passes: ensemble ? 8 : 1};
  },

  // Lines of JSON come first: {done}, then {error}, or {type, bytes, warnings} before the image itself.
  async upscale(file, {network, size, ensemble}, format, report, signal) {
    const answer = await post("/image", {name: file.name, network, size, ensemble, format}, file, signal);
    const reader = answer.body.getReader(), decoder = new TextDecoder();
    const read = async () => {
      try {
        return (await reader.read()).value;
      } catch {
        throw Error(noAnswer);
      }
    };
    let rest = new Uint8Array();
    for (;;) {
      const end = rest.indexOf(10);
      if (end < 0) {
        const more = await read();
        if (!more) throw Error(noAnswer);
        rest = new Uint8Array(await new Blob([rest, more]).arrayBuffer());
        continue;
      }
      const note = JSON.parse(decoder.decode(rest.subarray(0, end)));
      rest = rest.slice(end + 1);
      if (note.error) throw Error(note.error);
      if (note.type) {
        const parts = [rest];
        for (let more; (more = await read());) parts.push(more);
        const blob = new Blob(parts, {type: note.type});
        if (blob.size !== note.bytes) throw Error(noAnswer);
        return {blob, warnings: note.warnings};
      }
      report(note.done);
    }
  },
};

const noAnswer = "No answer. Is the program in the terminal still running?";

async function post(path, query, file, signal) {
  if (file.size > settings.bytes) throw Error(`The file has more than ${settings.bytes / 2 ** 20} MB.`);
  let answer;
  try {
    answer = await fetch(`${path}?${new URLSearchParams(query)}`, {method: "POST", body: file, signal});
  } catch {
    throw Error(noAnswer);
  }
  if (!answer.ok) throw Error(await answer.text());
  return answer;
}

const writtenSize = () => $("size").value.toLowerCase().replace(/\s/g, "").replace(",", ".").replace("×", "x");

function listScales(wanted) {
  const scales = [...new Set(settings.networks.map(network => network.scale))].sort((a, b) => a - b);
  const choices = [...scales.map(scale => [scale, `${scale} ×`]), ["other", "Other"]];
  for (const label of $("scales").querySelectorAll("label")) label.remove();
  $("size").before(...choices.map(([value, text]) => {
    const radio = make("input", {type: "radio", name: "scale", className: "unseen", value, checked: value === wanted});
    const label = make("label", {textContent: text});
    radio.onchange = () => listNetworks(value);
    label.prepend(radio);
    return label;
  }));
  listNetworks(wanted);
}

// For any size: those that make as much at least, the smallest first; for width and height the largest first.
function listNetworks(scale) {
  const isOther = scale === "other";
  $("size").hidden = !isOther;
  const least = Number(writtenSize()) || Infinity;
  const enough = settings.networks.filter(network => isOther ? network.scale >= least : network.scale === scale);
  const fitting = enough.length ? enough.sort((a, b) => a.scale - b.scale) : [...settings.networks].sort((a, b) => b.scale - a.scale);
  $("network").replaceChildren(...fitting.map(({name, title}) => make("option", {value: name, textContent: title ?? name})));
  if (isOther) $("size").focus();
}

$("size").oninput = () => listNetworks("other");

$("weights").onchange = async () => {
  const [file] = $("weights").files, note = $("network-note");
  if (!file) return;
  note.className = "note";
  note.textContent = `Reading ${file.name} …`;
  try {
    const added = await (await post("/network", {name: file.name}, file)).json();
    settings.networks.push(added);
    listScales(added.scale);
    $("network").value = added.name;
    note.textContent = `${file.name} makes images ${added.scale} times as large.`;
  } catch (error) {
    note.className = "bad";
    note.textContent = error.message;
  }
  $("weights").value = "";
};

if (settings.films) {
  $("files").accept += ",video/*,.mkv";
  $("invitation").textContent = "Drop images or films here";
}
listScales(settings.networks[0].scale);
