// The page: one request per image; thresholds then move without another.

import { ServiceError, address, detect, listModels, preview, showModel, token } from "./api.js";
import { Boxes } from "./boxes.js";
import { command } from "./curl.js";
import { asScore, byId, count, settled } from "./dom.js";
import { Panel } from "./panel.js";
import { Table } from "./table.js";

const state = {
  models: [], // by name, and of a name the newest last
  model: null, // the one in use
  file: null,
  answer: null, // of the preview: every box from a floor on
  exact: null, // the service's own answer, where the preview cannot hold every box
  guarded: false, // whether the service asks for a token
  asking: new AbortController(),
};

const boxes = new Boxes(byId("boxes"), light);
const table = new Table(light);
const panel = new Panel(() => {
  state.exact = null;
  redraw();
  refine();
});

// ---------------------------------------------------------------- display

function light(detection) {
  boxes.light(detection);
  table.light(detection);
}

/** The boxes that pass the current thresholds. */
function standing() {
  const found = state.exact ?? state.answer.detections;
  return found
    .map((one) => ({ ...one, threshold: panel.threshold(one.label) }))
    .filter((one) => one.score >= one.threshold)
    .map((one) => ({ ...one, caption: `${asScore(one.score)} ≥ ${asScore(one.threshold)}` }));
}

function redraw() {
  if (!state.answer) return;
  const shown = standing();
  boxes.show(shown, state.answer.image);
  table.show(shown);
  panel.update(state.answer.detections, shown);
  byId("found").hidden = shown.length === 0;
  const summary = summarised(shown);
  byId("summary").textContent = summary;
  byId("boxes").setAttribute("aria-label", summary);
  announce(summary);
  showCommand();
}

function summarised(shown) {
  if (shown.length === 0) return "No box reaches its threshold.";
  const numbers = new Map();
  for (const one of shown) numbers.set(one.class, (numbers.get(one.class) ?? 0) + 1);
  const parts = [...numbers].map(([name, number]) => `${number} × ${name}`);
  return `${count(shown.length, "box", "boxes")}: ${parts.join(", ")}`;
}

// Screen readers announce where a slider stops, not every step.
const announce = settled(500, (text) => { byId("announce").textContent = text; });

function showCommand() {
  byId("curl").textContent =
    command(address("v1/detect"), state.file.name, chosen(), state.guarded);
  byId("command").hidden = false;
}

/** The model as form fields; none for the service's default. */
function which() {
  const { models, model } = state;
  const fields = models.some(({ name }) => name !== model.name) ? { model: model.name } : {};
  return model === newest(model.name) ? fields : { ...fields, version: model.version };
}

const newest = (name) => state.models.findLast((one) => one.name === name);

/** Model and thresholds as form fields. */
function chosen() {
  const moved = Object.fromEntries(panel.moved);
  return panel.moved.size ? { ...which(), thresholds: JSON.stringify(moved) } : which();
}

// ---------------------------------------------------------------- requests

/** Run an action with requests, and show its error as a sentence. */
async function attempt(action, again) {
  byId("problem").hidden = true;
  try {
    await action();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ServiceError)) throw error;
    if (!state.answer) byId("summary").textContent = "";
    if (error.status === 401) askForToken();
    else complain(error.message, again);
  }
}

function complain(text, again) {
  byId("problem-text").textContent = text;
  byId("problem").hidden = false;
  byId("again").hidden = !again;
  byId("again").onclick = again;
}

function askForToken() {
  state.guarded = true;
  byId("door-reason").textContent = token.get()
    ? "The service does not take this token."
    : "This service asks for a token.";
  token.forget();
  byId("forget").hidden = true;
  byId("door").hidden = false;
  byId("token").focus();
}

let starting = null;
const start = () => {
  starting ??= attempt(begin, start).finally(() => { starting = null; });
};

async function begin() {
  await list();
  byId("forget").hidden = !token.get();
  state.guarded ||= Boolean(token.get());
  await use(newest(state.models[0].name));
}

async function list() {
  state.models = await listModels();
  const options = state.models.map((one, at) => {
    const { name, version } = one;
    return new Option(one === newest(name) ? name : `${name}, version ${version}`, at);
  });
  byId("model").replaceChildren(...options);
  byId("models").hidden = state.models.length < 2;
}

async function use(model) {
  await show(model);
  if (state.file) await look();
}

async function show(model) {
  const { card } = await showModel(model);
  state.model = model;
  byId("model").value = state.models.indexOf(model);
  byId("name").textContent = model.name;
  document.title = `${model.name}: detector`;
  panel.use(card);
}

/** Show the model of an answer, if the service has replaced it in the meantime. */
async function follow({ model, version, classes }) {
  const own = panel.card.thresholds;
  const same = ({ class: name, threshold }, at) =>
    own[at]?.name === name && own[at].threshold === threshold;
  if (version === state.model.version && classes.every(same)) return;
  await list();
  const now = state.models.find((one) => one.name === model && one.version === version);
  if (now) await show(now);
}

const take = (files) => {
  const file = files?.[0];
  if (!file) return;
  state.file = file;
  byId("hint").hidden = files.length < 2;
  byId("hint").textContent = `One at a time: of ${files.length} files, this is ${file.name}.`;
  showPhoto(file);
  byId("summary").textContent = "Looking…";
  lookAgain();
};

/** Detect once a model is known; a start in progress does so itself. */
function lookAgain() {
  if (state.model) attempt(look, lookAgain);
  else start();
}

async function look() {
  state.asking.abort();
  state.asking = new AbortController();
  state.answer = state.exact = null;
  boxes.show([], { width: 1, height: 1 });
  for (const id of ["found", "command"]) byId(id).hidden = true;
  byId("summary").textContent = "Looking…";
  byId("view").setAttribute("aria-busy", "true");
  const { signal } = state.asking;
  try {
    const answer = await preview(state.file, which(), signal);
    await follow(answer);
    if (signal.aborted) return;
    state.answer = answer;
    fit(state.answer.image);
    panel.fold(state.answer.detections);
    redraw();
    refine();
  } finally {
    if (!signal.aborted) byId("view").removeAttribute("aria-busy");
  }
}

/**
 * Request the boxes at these thresholds if the preview may lack some: it has no more than the
 * model returns at once, and none below its floor.
 */
const refine = settled(250, () => {
  const { answer, asking } = state;
  if (!answer) return;
  const { floor, exact_above: crowded } = answer;
  const lacking = (bar) => bar < floor || (crowded !== null && bar <= crowded);
  if (!answer.classes.some(({ label }) => lacking(panel.threshold(label)))) return;
  attempt(async () => {
    const fields = JSON.stringify(chosen());
    const { detections } = await detect(state.file, chosen(), asking.signal);
    if (state.answer !== answer || JSON.stringify(chosen()) !== fields) return; // moved on
    state.exact = detections;
    redraw();
  });
});

// ---------------------------------------------------------------- picture

function showPhoto(file) {
  const photo = byId("photo");
  URL.revokeObjectURL(photo.src);
  photo.src = URL.createObjectURL(file);
  photo.alt = file.name;
  photo.classList.remove("blank");
  photo.onerror = () => {
    photo.classList.add("blank"); // TIFF, in most browsers; the service reads it all the same
    photo.alt = `${file.name}, which this browser cannot show`;
  };
  photo.onload = () => fit({ width: photo.naturalWidth, height: photo.naturalHeight });
  byId("drop").hidden = true;
  byId("view").hidden = byId("other").hidden = false;
}

function fit({ width, height }) {
  byId("view").style.setProperty("--ratio", width / height);
}

// ---------------------------------------------------------------- events

for (const id of ["file", "camera"]) {
  byId(id).addEventListener("change", (event) => {
    take([...event.target.files]);
    event.target.value = ""; // so that the same file can be taken again
  });
}

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  take([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => take([...event.clipboardData.files]));

byId("model").addEventListener("change", (event) => {
  const model = state.models[event.target.value];
  attempt(() => use(model), () => attempt(() => use(model)));
});

byId("door").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set(byId("token").value.trim());
  byId("token").value = "";
  byId("door").hidden = true;
  if (state.file) lookAgain();
  else start();
});

byId("forget").addEventListener("click", () => {
  token.forget();
  location.reload();
});

byId("copy").addEventListener("click", async () => {
  const text = byId("curl");
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    // Without https browsers deny the clipboard; a selection can be copied by hand.
    getSelection().selectAllChildren(text);
    if (!document.execCommand("copy")) return;
  }
  byId("copy").textContent = "Copied";
  announce("Copied");
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 1500);
});

start();
