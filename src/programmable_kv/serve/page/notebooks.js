// Notebooks: fields to edit, what an edit did, and on a local server the text by the state of its tokens.

import { $, ask, bar, count, element, percent } from "./parts.js";

const MOST_LISTED = 200; // of very many, the latest
const OF_GATEWAY = ["", "erratum", "full"]; // modes of an edit in front of an upstream
const DATE = /^\d{4}-\d\d-\d\d$/;
const LINES = ["block", "json"]; // kinds whose values may have several lines
const CHOICES = { boolean: ["true", "false", "none"] };
let open = null; // the notebook that is asked for
let shown = ""; // id and version of the one whose fields are shown
let coloured = ""; // of the one whose tokens are shown
let told = ""; // of the one that the account is of

const local = () => document.body.dataset.kind === "local";
const versionOf = (notebook) => `${notebook.id} ${notebook.version}`;

// Shows the list, and the notebook that is open.
export async function showNotebooks() {
  $("notebooks-part").hidden = false;
  const list = (await ask("/v1/notebooks")).data;
  const buttons = list.slice(-MOST_LISTED).map((each) => {
    const what = local() ? `${count(each.tokens)} tokens` : each.upstream_model;
    const button = element("button", { type: "button" }, `${each.id} (${what})`);
    button.setAttribute("aria-current", String(each.id === open));
    button.onclick = () => { open = each.id; told = ""; return refreshed(); };
    return button;
  });
  const more = list.length - buttons.length;
  if (more) buttons.unshift(element("span", { className: "soft" }, `${count(more)} earlier ones, and`));
  const none = element("p", { className: "soft" }, "None yet. Create one with POST /v1/notebooks.");
  $("notebooks").replaceChildren(...(buttons.length ? buttons : [none]));
  const notebook = list.find((each) => each.id === open);
  $("notebook").hidden = !notebook;
  if (!notebook) return;
  if (shown !== versionOf(notebook)) showFields(notebook);
  if (!local()) showUsage(notebook.usage);
  else if (coloured !== versionOf(notebook)) await showTokens(notebook);
}

async function refreshed() {
  try {
    await showNotebooks();
  } catch (error) {
    tell(error.message);
  }
}

function tell(text, of = "") {
  $("account").textContent = text;
  told = of;
}

function showFields(notebook) {
  const before = shown.split(" ")[0];
  shown = versionOf(notebook);
  $("notebook-name").textContent = `${notebook.model}, version ${notebook.version}`;
  const rows = Object.entries(notebook.fields).flatMap(([name, value]) => {
    const type = notebook.types[name];
    const label = element("label", { htmlFor: `field-${name}` }, name, element("small", {}, limits(type)));
    return [label, control(name, value, type)];
  });
  $("values").replaceChildren(...rows);
  if (before !== notebook.id || (told && told !== shown)) tell(""); // a refusal stays until something else is told
  askToDelete("");
}

function limits(type) {
  const found = [type.kind];
  if (type.at_least !== undefined) found.push(`at least ${type.at_least}`);
  if (type.at_most !== undefined) found.push(`at most ${type.at_most}`);
  if (type.max_length !== undefined) found.push(`at most ${count(type.max_length)} characters`);
  if (type.charset) found.push(`of [${type.charset}]`);
  return found.join(", ");
}

// What a value is edited with. Whether it is taken is the server's to say: nothing is checked here.
function control(name, value, type) {
  const known = { id: `field-${name}`, name };
  const choices = type.among || CHOICES[type.kind];
  let made;
  if (choices) {
    const all = choices.includes(value) ? choices : [value, ...choices];
    made = element("select", known, ...all.map((each) => element("option", { value: each, selected: each === value }, each)));
  } else if (LINES.includes(type.kind)) {
    made = element("textarea", { ...known, value, rows: Math.min(12, value.split("\n").length + 1) });
  } else {
    const kind = type.kind === "date" && DATE.test(value) ? "date" : "text";
    made = element("input", { ...known, type: kind, value, inputMode: type.kind === "number" ? "decimal" : "text" });
  }
  return Object.assign(made, { kind: type.kind, before: made.value });
}

// A value as JSON. That of a JSON field is sent as it is written, so that no number in it changes.
function written(each) {
  if (each.kind !== "json" || fault(each.before)) return JSON.stringify(each.value);
  const found = fault(each.value);
  if (found) throw new Error(`the value of ${each.name} is not valid JSON: ${found}`);
  return each.value;
}

function fault(text) {
  try {
    JSON.parse(text);
    return "";
  } catch (error) {
    return error.message;
  }
}

$("fields").onsubmit = async (event) => {
  event.preventDefault();
  const [id, version] = shown.split(" ");
  const mode = $("mode").value;
  try {
    const changed = [...$("values").querySelectorAll("input, select, textarea")].filter((each) => each.value !== each.before);
    const edited = await ask(`/v1/notebooks/${id}/fields${mode ? `?mode=${mode}` : ""}`, {
      method: "PATCH", headers: { "content-type": "application/json", "if-match": `"${version}"` },
      body: `{${changed.map((each) => `${JSON.stringify(each.name)}:${written(each)}`).join(",")}}`,
    });
    tell((local() ? computed : sent)(edited), versionOf(edited));
    await showNotebooks();
  } catch (error) {
    tell(error.message);
  }
};

function computed({ account, tokens }) {
  return `${account.mode_used}: ${count(account.tokens_computed)} of ${count(tokens)} tokens computed, ${account.exactness}`;
}

function sent({ account }) {
  const used = account.mode_used + (account.why ? ` (${account.why})` : "");
  if (!account.line_bytes) return `${used}: a new conversation begins with the latest values in their places`;
  return `${used}: a line of ${count(account.line_bytes)} bytes states the latest values in a new conversation`;
}

function showUsage(usage) {
  const share = percent(usage.cached_tokens, usage.input_tokens);
  const said = `${count(usage.requests)} requests since this gateway started, ${share} of their input from the cache`;
  $("usage").replaceChildren(said, bar(usage.cached_tokens, 0, usage.input_tokens));
}

async function showTokens(notebook) {
  const text = await ask(`/v1/notebooks/${notebook.id}/tokens`);
  if (shown !== versionOf(notebook)) return; // another one was opened meanwhile
  const name = (state) => state.replace(" ", "-");
  $("tokens").replaceChildren(...text.runs.map((run) =>
    element("span", { className: `${name(run.state)}${run.erratum ? " erratum" : ""}`, title: run.state }, run.text)));
  $("legend").replaceChildren(...Object.entries(text.states).map(([state, row]) =>
    element("span", {}, element("i", { className: name(state) }), `${state} (${count(row.tokens)}): ${row.meaning}`)));
  coloured = shown;
}

// The first click asks, the second one deletes that version.
function askToDelete(version) {
  $("delete").dataset.asked = version;
  $("delete").textContent = version ? "Delete it for good" : "Delete";
}

$("delete").onclick = async () => {
  if ($("delete").dataset.asked !== shown) return askToDelete(shown);
  const [id, version] = shown.split(" ");
  try {
    await ask(`/v1/notebooks/${id}`, { method: "DELETE", headers: { "if-match": `"${version}"` } });
    if (open === id) open = null;
    await showNotebooks();
  } catch (error) {
    askToDelete("");
    tell(error.message);
  }
};

if (local()) {
  $("edit").textContent = "Edit in the cache";
} else {
  for (const option of [...$("mode").options]) if (!OF_GATEWAY.includes(option.value)) option.remove();
}
for (const each of document.querySelectorAll("[data-only]")) each.hidden = each.dataset.only !== document.body.dataset.kind;
