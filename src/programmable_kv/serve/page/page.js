// The page of `pkv serve`: what a gateway found, or a local server's notebooks. Whatever comes from a prompt is set as text.

const EVERY_MS = 2000;
const $ = (id) => document.getElementById(id);
const count = (number) => Number(number || 0).toLocaleString("en");
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "–");
let open = null; // the notebook that is shown
let told = ""; // the version that the account is of
let shown = ""; // its id and version, and so whether its tokens are up to date

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  const key = sessionStorage.getItem("pkv-key");
  if (key) headers["x-pkv-key"] = key;
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.status === 401) $("key-form").hidden = false;
  if (answer.status === 404) return null;
  const data = answer.status === 204 ? {} : await answer.json();
  if (!answer.ok) throw new Error(data.error?.message || `the server answered ${answer.status}`);
  return data;
}

function table(head, rows) {
  const cell = (name) => (value, at) => {
    const number = head[at].startsWith("#");
    return element(name, { className: number ? "number" : "" }, value ?? "");
  };
  const top = element("tr", {}, ...head.map((title, at) => cell("th")(title.replace("#", ""), at)));
  const body = rows.map((row) => element("tr", {}, ...row.map(cell("td"))));
  return element("div", { className: "scroll" }, element("table", {}, element("thead", {}, top), element("tbody", {}, ...body)));
}

function bar(cached, lost, whole) {
  const part = (kind, amount) => {
    const made = element("i", { className: kind });
    made.style.width = `${whole ? Math.min(100, (100 * amount) / whole) : 0}%`;
    return made;
  };
  const label = `${percent(cached, whole)} of the input from the cache`;
  const made = element("div", { className: "bar", title: label }, part("hit", cached), part("lost", lost));
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  return made;
}

function card(value, what) {
  return element("div", { className: "card" }, element("b", {}, value), element("small", {}, what));
}

// The two texts with what differs marked: all between what they share at both ends, in whole words.
function difference(before, after) {
  const [one, other] = [before, after].map((text) => text.match(/\w+|\W/gu) || []);
  let start = 0;
  while (start < Math.min(one.length, other.length) && one[start] === other[start]) start += 1;
  let end = 0;
  while (end < Math.min(one.length, other.length) - start && one.at(-1 - end) === other.at(-1 - end)) end += 1;
  const line = (words, mark) => [
    words.slice(0, start).join(""),
    element(mark, {}, words.slice(start, words.length - end).join("")),
    words.slice(words.length - end).join(""),
  ];
  return element("pre", {}, ...line(one, "del"), "\n", ...line(other, "ins"));
}

function money(amounts) {
  const found = Object.entries(amounts || {}).filter(([, amount]) => amount);
  return found.map(([currency, amount]) => ` (${currency} ${amount.toFixed(Math.abs(amount) < 1 ? 4 : 2)})`).join("");
}

function showGateway(report) {
  $("gateway").hidden = false;
  $("about").textContent = `gateway, mode ${report.mode}${report.since ? `, since ${report.since}` : ""}`;
  const routes = Object.entries(report.routes || {});
  const sum = (name) => routes.reduce((total, [, route]) => total + route[name], 0);
  const gained = (report.rewriting?.routes || []).reduce((total, route) => total + route.gained_tokens_estimate, 0);
  const cards = [
    card(count(sum("requests")), "requests"),
    card(percent(sum("cached_tokens"), sum("input_tokens")), "of the input read from the cache"),
    card(count(sum("lost_tokens_at_most")), `tokens computed again, at most${money(report.lost_money_at_most)}`),
  ];
  if (report.rewriting) {
    cards.push(card(count(gained), `tokens won by rewriting, about${money(report.rewriting.gained_money_estimate)}`));
  }
  $("totals").replaceChildren(...cards);
  const rows = routes.map(([name, route]) => [
    element("code", {}, name), count(route.requests), count(route.hit), count(route.miss),
    bar(route.cached_tokens, route.lost_tokens_at_most, route.input_tokens),
    Object.entries(route.causes).filter(([, cause]) => cause.fix).slice(0, 3)
      .map(([cause, told]) => `${cause} (${count(told.requests)}, ${told.place})`).join("; "),
  ]);
  const head = ["route", "#requests", "#hits", "#misses", "input: from the cache, lost", "causes, the dearest first"];
  $("routes").replaceChildren(rows.length ? table(head, rows) : element("p", { className: "soft" }, "No requests yet."));
  const sessions = (report.sessions || []).slice(0, 12).map((each) => [
    element("code", {}, each.session), count(each.requests), count(each.miss),
    bar(each.cached_tokens, each.lost_tokens_at_most, each.input_tokens),
  ]);
  $("sessions").replaceChildren(table(["conversation", "#requests", "#misses", "input"], sessions));
  $("rewriting-part").hidden = !report.rewriting;
  if (report.rewriting) showRewriting(report.rewriting);
}

function showRewriting(rewriting) {
  const rows = rewriting.routes.map((route) => [
    element("code", {}, route.route), route.model,
    Object.entries(route.actions).map(([action, times]) => `${action} ${count(times)}`).join(", "),
    count(route.cached_tokens), count(route.added_tokens_estimate), count(route.gained_tokens_estimate),
  ]);
  const head = ["route", "model", "what was done", "#tokens cached", "#added, about", "#won, about"];
  const found = rewriting.upstream.map((row) => [row.of, row.about, row.verdict]);
  $("rewriting").replaceChildren(table(head, rows), table(["upstream", "what", "found out"], found));
}

function showMiss(miss) {
  if (!miss || !miss.cause) {
    $("miss").replaceChildren(element("p", { className: "soft" }, "None."));
    return;
  }
  const lost = miss.lost === null ? "" : `, at most ${count(miss.lost)} tokens`;
  $("miss").replaceChildren(
    element("p", {}, element("b", {}, miss.cause), ` in ${miss.place} of ${miss.route}${lost}: `, element("code", {}, miss.path)),
    difference(miss.before, miss.after),
    element("p", { className: "soft" }, miss.fix),
  );
}

async function showLocal(list) {
  $("local").hidden = false;
  $("about").textContent = "a model with notebooks";
  const buttons = list.data.map((each) => {
    const button = element("button", { type: "button" }, `${each.id} (${count(each.tokens)} tokens)`);
    button.setAttribute("aria-current", String(each.id === open));
    button.onclick = () => { open = each.id; shown = ""; return refresh(); };
    return button;
  });
  const none = element("p", { className: "soft" }, "None yet: POST /v1/notebooks makes one.");
  $("notebooks").replaceChildren(...(buttons.length ? buttons : [none]));
  const notebook = list.data.find((each) => each.id === open);
  $("notebook").hidden = !notebook;
  if (notebook && shown !== `${notebook.id} ${notebook.version}`) await showNotebook(notebook);
}

async function showNotebook(notebook) {
  $("notebook-name").textContent = `${notebook.model}, version ${notebook.version}`;
  const inputs = Object.entries(notebook.fields).flatMap(([name, value]) => [
    element("label", { htmlFor: `field-${name}` }, name),
    element("input", { id: `field-${name}`, name, value, defaultValue: value }),
  ]);
  $("values").replaceChildren(...inputs);
  if (told !== `${notebook.id} ${notebook.version}`) $("account").textContent = "";
  const text = await ask(`/v1/notebooks/${notebook.id}/tokens`);
  if (!text) return;
  const name = (state) => state.replace(" ", "-");
  $("tokens").replaceChildren(...text.runs.map((run) =>
    element("span", { className: `${name(run.state)}${run.erratum ? " erratum" : ""}`, title: run.state }, run.text)));
  $("legend").replaceChildren(...Object.entries(text.states).map(([state, row]) =>
    element("span", {}, element("i", { className: name(state) }), `${state} (${count(row.tokens)}): ${row.meaning}`)));
  shown = `${notebook.id} ${notebook.version}`;
}

$("fields").onsubmit = async (event) => {
  event.preventDefault();
  const inputs = [...$("values").querySelectorAll("input")].filter((input) => input.value !== input.defaultValue);
  const mode = $("mode").value;
  const changed = Object.fromEntries(inputs.map((input) => [input.name, input.value]));
  try {
    const edited = await ask(`/v1/notebooks/${open}/fields${mode ? `?mode=${mode}` : ""}`, {
      method: "PATCH", headers: { "content-type": "application/json", "if-match": `"${shown.split(" ")[1]}"` },
      body: JSON.stringify(changed),
    });
    const account = edited.account;
    told = `${edited.id} ${edited.version}`;
    $("account").textContent =
      `${account.mode_used}: ${count(account.tokens_computed)} of ${count(edited.tokens)} tokens computed, ${account.exactness}`;
    await refresh();
  } catch (error) {
    $("account").textContent = error.message;
  }
};

$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("pkv-key", $("key").value);
  refresh();
};

async function refresh() {
  try {
    if (document.body.dataset.kind === "gateway") {
      showGateway(await ask("/pkv/report"));
      showMiss(await ask("/pkv/miss"));
    } else {
      await showLocal(await ask("/v1/notebooks"));
    }
    $("problem").hidden = true;
    $("key-form").hidden = true;
  } catch (error) {
    $("problem").textContent = error.message;
    $("problem").hidden = false;
  }
}

async function loop() {
  if (!document.hidden) await refresh();
  setTimeout(loop, EVERY_MS);
}

loop();
