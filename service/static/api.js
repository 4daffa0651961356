// Requests to the service. Errors carry one sentence.

// Relative to the page, so that it also works behind a proxy that adds a prefix.
const root = new URL("..", import.meta.url);

const TOKEN = "ghm-token";

export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set: (value) => sessionStorage.setItem(TOKEN, value),
  forget: () => sessionStorage.removeItem(TOKEN),
};

export const address = (path) => new URL(path, root).href;

/** A failed request: `status` is 0 if there was no answer. */
export class ServiceError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = token.get() ? { Authorization: `Bearer ${token.get()}` } : {};
  let response;
  try {
    response = await fetch(new URL(path, root), { ...options, headers });
    if (response.ok) return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The service does not answer. Is it running?");
  }
  throw new ServiceError(response.status, await sentence(response));
}

/** The detail of a problem, or a sentence for the status if a proxy answered. */
async function sentence(response) {
  const problem = await response.json().catch(() => ({}));
  const detail = problem.detail ?? `the answer was ${response.status} ${response.statusText}`.trim();
  const text = detail[0].toUpperCase() + detail.slice(1);
  const after = response.headers.get("Retry-After");
  const seconds = /^\d+$/.test(after ?? "") ? ` Try again in ${after} s.` : "";
  return (/[.!?]$/.test(text) ? text : `${text}.`) + seconds;
}

export const listModels = async () => (await ask("v1/models")).models;

export const showModel = ({ name, version }) =>
  ask(`v1/models/${encodeURIComponent(name)}?version=${encodeURIComponent(version)}`);

function form(file, options) {
  const body = new FormData();
  body.append("file", file, file.name);
  for (const [name, value] of Object.entries(options)) body.append(name, value);
  return body;
}

/** All boxes whose score reaches a floor, whatever the threshold of their class. */
export const preview = (file, options, signal) =>
  ask("v1/thresholds/preview", { method: "POST", body: form(file, options), signal });

/** The boxes that pass these thresholds. */
export const detect = (file, options, signal) =>
  ask("v1/detect", { method: "POST", body: form(file, options), signal });
