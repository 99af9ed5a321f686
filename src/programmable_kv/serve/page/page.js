// The page of `pkv serve`: what a gateway found, and notebooks. Whatever comes from a prompt is set as text.

import { showGateway, showMiss } from "./gateway.js";
import { showNotebooks } from "./notebooks.js";
import { $, ask } from "./parts.js";

const EVERY_MS = 2000;
const ROUNDS = 5; // of a gateway, from one look at its notebooks to the next: each counts as a request of the key

$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("pkv-key", $("key").value);
  refresh();
};

async function refresh(notebooks = true) {
  try {
    if (document.body.dataset.kind === "local") {
      $("about").textContent = "a model with notebooks";
    } else {
      showGateway(await ask("/pkv/report"));
      showMiss(await ask("/pkv/miss"));
    }
    if (notebooks) await showNotebooks();
    $("problem").hidden = true;
    $("key-form").hidden = true;
  } catch (error) {
    $("problem").textContent = error.message;
    $("problem").hidden = false;
  }
}

async function loop(round = 0) {
  const often = document.body.dataset.kind === "local";
  if (!document.hidden) await refresh(often || round % ROUNDS === 0);
  setTimeout(() => loop(round + 1), EVERY_MS);
}

loop();
