// The page: a model of `loratrf-export --swappable required`, adapters that change between two runs, and what each costs.
import { Tokenizer } from "@huggingface/tokenizers";
import { AdapterSession } from "loratrf-deploy";
import * as ort from "onnxruntime-web";

const LABELS = ["negative", "positive"];
const element = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e6 ? 2 : 1)} MB`;
const facts = new Map();

function say(name, value) {
  facts.set(name, value);
  const rows = [...facts].map(([name, value]) => {
    const row = document.createElement("tr");
    for (const [tag, text] of [["th", name], ["td", value]]) {
      row.append(Object.assign(document.createElement(tag), { textContent: text }));
    }
    return row;
  });
  element("facts").replaceChildren(...rows);
}

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;

async function timed(work) {
  const start = performance.now();
  return [await work(), performance.now() - start];
}

async function download(name) {
  const response = await fetch(`/model/${name}`);
  if (!response.ok) throw new Error(`/model/${name}: ${response.status}. Run make demo-web, which makes it.`);
  return new Uint8Array(await response.arrayBuffer());
}

/** What is downloaded once, whatever computes. */
async function read() {
  const [settings, tokenizerFile, tokenizerConfig, manifest, graph, weights] = await Promise.all(
    ["demo.json", "tokenizer.json", "tokenizer_config.json", "loratrf.json", "model.onnx", "model.onnx.data"].map(download),
  );
  const json = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
  const { adapters } = json(settings);
  const files = await Promise.all(adapters.map((name) => download(`${name}.onnx_adapter`)));
  say("model, downloaded once", megabytes(graph.length + weights.length));
  adapters.forEach((name, at) => say(`adapter ${name}`, megabytes(files[at].length)));
  const boxes = adapters.map((name, at) => {
    const box = Object.assign(document.createElement("input"), { type: "radio", name: "adapter", value: name });
    box.checked = at === 0;
    const label = document.createElement("label");
    label.append(box, ` ${name}`);
    return label;
  });
  element("adapters").replaceChildren(...boxes);
  const tokenizer = new Tokenizer(json(tokenizerFile), json(tokenizerConfig));
  return { tokenizer, manifest, graph, weights, adapters: adapters.map((name, at) => [name, files[at]]) };
}

async function open({ manifest, graph, weights, adapters }, provider) {
  const [session, opening] = await timed(() =>
    AdapterSession.create(ort, graph, {
      manifest,
      externalData: [{ path: "model.onnx.data", data: weights }],
      executionProviders: [provider],
    }),
  );
  say("opening it", `${opening.toFixed(0)} ms`);
  for (const [name, bytes] of adapters) {
    const [, loading] = await timed(() => session.load(name, bytes));
    say(`adapter ${name}`, `${megabytes(bytes.length)}, loaded in ${loading.toFixed(0)} ms`);
  }
  return session;
}

function show(logits) {
  const powers = [...logits.data].map(Math.exp);
  const sum = powers.reduce((a, b) => a + b);
  const bars = powers.map((power, at) => {
    const bar = Object.assign(document.createElement("div"), { className: "bar" });
    const [name, number] = [LABELS[at], (power / sum).toFixed(3)].map((textContent) =>
      Object.assign(document.createElement("span"), { textContent }),
    );
    bar.append(name, Object.assign(document.createElement("meter"), { value: power / sum }), number);
    return bar;
  });
  element("answer").replaceChildren(...bars);
  element("answer").dataset.logits = JSON.stringify([...logits.data]);
}

async function main() {
  if (await navigator.gpu?.requestAdapter()) document.querySelector("input[value=webgpu]").disabled = false;
  const files = await read();
  let session = await open(files, chosen("provider"));
  let last;
  let asked = 0;
  let done = 0;
  let working = false;

  // One run at a time, of the newest text; what was typed meanwhile is next.
  async function answer() {
    asked += 1;
    if (working) return;
    working = true;
    try {
      while (done < asked) {
        done = asked;
        const adapter = chosen("adapter");
        const { ids, attention_mask: mask } = files.tokenizer.encode(element("text").value);
        const tensor = (row) => new ort.Tensor("int64", BigInt64Array.from(row.slice(0, 256), BigInt), [1, Math.min(row.length, 256)]);
        const inputs = { input_ids: tensor(ids), attention_mask: tensor(mask), token_type_ids: tensor(ids.map(() => 0)) };
        const [{ logits }, running] = await timed(() => session.run(inputs, { adapter }));
        show(logits);
        say(last && last !== adapter ? "run after a switch" : "run", `${running.toFixed(1)} ms, ${ids.length} tokens`);
        last = adapter;
        element("answer").dataset.done = `${chosen("provider")} ${adapter} ${element("text").value}`;
        element("error").textContent = "";
      }
    } catch (error) {
      element("error").textContent = error.message;
    } finally {
      working = false;
    }
  }

  element("text").addEventListener("input", answer);
  element("adapters").addEventListener("change", answer);
  element("providers").addEventListener("change", async () => {
    try {
      const next = await open(files, chosen("provider"));
      const before = session;
      session = next;
      await before.release();
      await answer();
    } catch (error) {
      element("error").textContent = error.message;
    }
  });
  await answer();
}

main().catch((error) => (element("error").textContent = error.message));
