// The page: what its parts share, and its start.
"use strict";

const $ = (id) => document.getElementById(id);
const page = { model: null, study: null, viewer: null, job: null, editing: null, masks: new Map(), labels: {} };

const NO_ANSWER = "The server does not answer: is ctinstruct app still running?";

async function call(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error(NO_ANSWER);
  }
  if (answer.status === 204) return null;
  const found = await answer.json().catch(() => ({}));
  if (answer.status === 300) return found; // several series: one must be chosen
  if (!answer.ok) throw new Error(found.error || `The server says ${answer.status}.`);
  return found;
}

function complain(error) {
  $("error").textContent = error.message || String(error);
  $("error").hidden = false;
}

function calm() {
  $("error").hidden = true;
}

function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text; // never as HTML: it may come from a scan or the model
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function button(text, action, attributes = {}) {
  const element = make("button", text, { type: "button", ...attributes });
  element.addEventListener("click", action);
  return element;
}

const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

function choice(title, options) {
  // A question with buttons, {value: words}; null where it is closed without an answer.
  const dialog = $("dialog");
  $("dialog-title").textContent = title;
  $("dialog-options").replaceChildren(...Object.entries(options).map(([value, words]) => make("button", words, { value })));
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue || null), { once: true }));
}

// --- tabs of the answers

const TABS = ["findings", "ask", "masks", "report", "save"];

function showTab(name) {
  for (const one of TABS) {
    $(`tab-${one}`).setAttribute("aria-selected", one === name);
    $(`tab-${one}`).tabIndex = one === name ? 0 : -1;
    $(`panel-${one}`).hidden = one !== name;
  }
}

function startTabs() {
  for (const [index, name] of TABS.entries()) {
    $(`tab-${name}`).addEventListener("click", () => showTab(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = TABS[(index + step + TABS.length) % TABS.length];
      showTab(next);
      $(`tab-${next}`).focus();
    });
  }
  showTab("findings");
}

async function start() {
  try {
    page.model = await call("GET", "api/model");
  } catch (error) {
    complain(error);
    return;
  }
  $("notice").textContent = page.model.notice;
  startTabs();
  startViewer();
  startMasks();
  startEditing();
  startMeasuring();
  startFindings();
  startAsking();
  startWriting();
  await startOpening();
  document.body.dataset.ready = "yes";
}

start();
