// The reference at /docs: every operation of the OpenAPI document, and what it takes and answers.

import { byId, make } from "./dom.js";

const document_ = await (await fetch(new URL("../openapi.json", import.meta.url))).json();

/** The schema that a reference names. */
function resolved(schema = {}) {
  const name = schema.$ref?.split("/").at(-1);
  return name ? { title: name, ...document_.components.schemas[name] } : schema;
}

/** The type of a schema in a few words. */
function kind(schema) {
  const one = resolved(schema);
  if (one.enum) return one.enum.join(" | ");
  if (one.const !== undefined) return JSON.stringify(one.const);
  const variants = one.anyOf ?? one.oneOf;
  if (variants && !one.properties) return [...new Set(variants.map(kind))].join(" or ");
  if (one.type === "array") return `list of ${kind(one.items)}`;
  return schema.$ref ? one.title : (one.type ?? "any");
}

function fields(schema, required = resolved(schema).required ?? []) {
  const { properties = {} } = resolved(schema);
  return Object.entries(properties).map(([name, field]) => row(name, field, required.includes(name)));
}

function row(name, field, required) {
  const note = [kind(field), required && "required"].filter(Boolean).join(", ");
  return make("tr", {},
    make("th", { scope: "row" }, make("code", { textContent: name })),
    make("td", { textContent: note }),
    make("td", { textContent: field.description ?? resolved(field).description ?? "" }));
}

function table(title, rows) {
  if (!rows.length) return [];
  return [make("h3", { textContent: title }), make("table", {}, make("tbody", {}, ...rows))];
}

function content(title, { content = {} } = {}) {
  return Object.entries(content).flatMap(([type, { schema }]) =>
    table(`${title}, ${type}: ${kind(schema)}`, fields(resolved(schema).items ?? schema)));
}

function operation(path, method, { summary, description, parameters = [], requestBody, responses }) {
  const inputs = parameters.map((one) =>
    row(one.name, { ...one.schema, description: one.description }, one.required));
  const answers = Object.entries(responses).map(([status, one]) =>
    row(status, { ...Object.values(one.content ?? {})[0]?.schema, description: one.description }));
  return make("details", { id: `${method}${path}` },
    make("summary", {}, make("code", { textContent: `${method.toUpperCase()} ${path}` }),
      ` ${summary ?? ""}`),
    make("p", { textContent: description ?? "" }),
    ...table("Parameters", inputs), ...content("Body", requestBody), ...table("Answers", answers),
    ...content("Answer 200", responses["200"]));
}

const { title, version, description } = document_.info;
byId("title").textContent = `${title} ${version}`;
byId("description").textContent = description;
for (const [path, operations] of Object.entries(document_.paths)) {
  for (const [method, one] of Object.entries(operations)) {
    byId("operations").append(operation(path, method, one));
  }
}
