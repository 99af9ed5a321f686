// What a gateway found: its report, and the latest miss.

import { $, bar, count, element, percent, table } from "./parts.js";

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

export function showGateway(report) {
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
    cards.push(card(count(gained), `tokens gained by rewriting, about${money(report.rewriting.gained_money_estimate)}`));
  }
  $("totals").replaceChildren(...cards);
  const rows = routes.map(([name, route]) => [
    element("code", {}, name), count(route.requests), count(route.hit), count(route.miss),
    bar(route.cached_tokens, route.lost_tokens_at_most, route.input_tokens),
    Object.entries(route.causes).filter(([, cause]) => cause.fix).slice(0, 3)
      .map(([cause, told]) => `${cause} (${count(told.requests)}, ${told.place})`).join("; "),
  ]);
  const head = ["route", "#requests", "#hits", "#misses", "input: from the cache, lost", "causes, most expensive first"];
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
  const head = ["route", "model", "what was done", "#tokens cached", "#added, about", "#gained, about"];
  const found = rewriting.upstream.map((row) => [row.of, row.about, row.verdict]);
  $("rewriting").replaceChildren(table(head, rows), table(["upstream", "what", "finding"], found));
}

export function showMiss(miss) {
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
