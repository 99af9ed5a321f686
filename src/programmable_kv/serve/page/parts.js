// What the parts of the page share: asking the server, and making elements. Whatever comes from a prompt is set as text.

export const $ = (id) => document.getElementById(id);
export const count = (number) => Number(number || 0).toLocaleString("en");
export const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "–");

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// The answer's data. A refusal is thrown with the server's own message, and with its status.
export async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  const key = sessionStorage.getItem("pkv-key");
  if (key) headers["x-pkv-key"] = key;
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.status === 401) $("key-form").hidden = false;
  const data = answer.status === 204 ? {} : await answer.json();
  if (answer.ok) return data;
  throw Object.assign(new Error(data.error?.message || `the server answered ${answer.status}`), { status: answer.status });
}

export function table(head, rows) {
  const cell = (name) => (value, at) => {
    const number = head[at].startsWith("#");
    return element(name, { className: number ? "number" : "" }, value ?? "");
  };
  const top = element("tr", {}, ...head.map((title, at) => cell("th")(title.replace("#", ""), at)));
  const body = rows.map((row) => element("tr", {}, ...row.map(cell("td"))));
  return element("div", { className: "scroll" }, element("table", {}, element("thead", {}, top), element("tbody", {}, ...body)));
}

export function bar(cached, lost, whole) {
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
