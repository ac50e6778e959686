// The page: opens a study, draws it by NiiVue, asks the server and shows what comes back.
"use strict";

const $ = (id) => document.getElementById(id);
const page = { model: null, study: null, upload: null, viewer: null, job: null, masks: new Map() };

// --- talking to the server

async function call(method, path, body) {
  const options = { method };
  if (body instanceof Blob) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: is ctinstruct app still running?");
  }
  if (answer.status === 204) return null;
  const told = await answer.json().catch(() => ({}));
  if (answer.status === 300) return told; // several series: one must be chosen
  if (!answer.ok) throw new Error(told.error || `The server says ${answer.status}.`);
  return told;
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

const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// --- opening

async function openFiles(files) {
  calm();
  $("choose").hidden = true;
  const list = [...files].filter((file) => !file.name.startsWith("."));
  if (!list.length) return;
  const total = list.reduce((sum, file) => sum + file.size, 0);
  try {
    if (total > page.model.upload_bytes) throw new Error("These files are larger than the server takes.");
    const { upload } = await call("POST", "api/uploads");
    let sent = 0;
    for (const file of list) {
      $("opening").textContent = `Sending ${file.name}, ${Math.round((100 * sent) / total)} %`;
      await call("PUT", `api/uploads/${upload}?name=${encodeURIComponent(file.name)}`, file);
      sent += file.size;
    }
    await openUpload({ upload });
  } catch (error) {
    complain(error);
  }
  $("opening").textContent = "";
}

async function openUpload(request) {
  $("opening").textContent = "Reading the scan …";
  const study = await call("POST", "api/studies", request);
  if (!study.series) return show(study);
  // several CT series: the list to choose from
  page.upload = study.upload;
  $("series").replaceChildren(
    ...study.series.map((one) => {
      const parts = [one.description || "without description", `${one.slices} slices`];
      if (one.number !== null) parts.unshift(`series ${one.number}`);
      if (one.spacing) parts.push(`${one.spacing.map((mm) => mm.toFixed(2)).join(" × ")} mm`);
      return make("option", parts.join(", "), { value: one.uid });
    }),
  );
  $("choose").hidden = false;
  $("series").focus();
}

async function openSeries(event) {
  event.preventDefault();
  calm();
  $("choose").hidden = true;
  try {
    await openUpload({ upload: page.upload, series: $("series").value });
  } catch (error) {
    complain(error);
  }
  $("opening").textContent = "";
}

async function openSample() {
  calm();
  $("choose").hidden = true;
  $("opening").textContent = "Making a scan …";
  try {
    await show(await call("POST", "api/studies", { sample: Math.floor(Math.random() * 1e6) + 1000000 }));
  } catch (error) {
    complain(error);
  }
  $("opening").textContent = "";
}

async function show(study) {
  page.study = study;
  page.masks.clear();
  for (const id of ["chat", "masks", "bars", "text", "table", "fitness", "warnings", "remarks"]) $(id).replaceChildren();
  const said = $("notice").textContent; // the model's own note stands there already
  for (const note of study.warnings.filter((one) => !said.includes(one))) $("warnings").append(make("p", note, { class: "warning" }));
  const [depth, height, width] = study.shape;
  $("facts").textContent =
    `${study.name || "made-up scan"}: ${width} × ${height} × ${depth} voxels of ` +
    `${study.spacing[2]} × ${study.spacing[1]} × ${study.spacing[0]} mm`;
  $("open").hidden = true;
  $("study").hidden = false;
  const base = `api/studies/${study.study}/results/`;
  for (const [id, file] of [["get-findings", "findings.json"], ["get-report", "report.txt"], ["get-page", "report.html"], ["get-seg", "masks.dcm"]]) {
    $(id).href = base + file;
    $(id).setAttribute("download", file);
  }
  $("seg-item").hidden = true;
  await draw(`api/studies/${study.study}/scan.nii`);
  location.hash = study.study; // a reload finds it again
  await restore();
  $("canvas").dataset.ready = "yes";
}

async function reopen() {
  // The study that the address names, as long as the server has it.
  const id = location.hash.slice(1);
  if (!id || (page.study && page.study.study === id)) return;
  try {
    await show(await call("GET", `api/studies/${encodeURIComponent(id)}`));
  } catch (error) {
    history.replaceState(null, "", location.pathname);
    complain(error);
  }
}

async function closeStudy() {
  history.replaceState(null, "", location.pathname);
  const study = page.study;
  await cancel();
  page.study = null;
  $("study").hidden = true;
  $("open").hidden = false;
  if (study) await call("DELETE", `api/studies/${study.study}`).catch(() => {});
}

// --- asking

async function work(words) {
  // Ask for something and wait for it; null where it was cancelled.
  calm();
  $("remarks").replaceChildren();
  const study = page.study.study;
  let state;
  for (;;) {
    try {
      state = await call("POST", `api/studies/${study}/jobs`, words);
      break;
    } catch (error) {
      if (!/try again later/.test(error.message)) throw error;
      $("progress").textContent = "The server is busy; trying again …";
      await wait(3000);
    }
  }
  page.job = state.job;
  $("cancel").hidden = false;
  try {
    while (state.status === "queued" || state.status === "running") {
      $("progress").textContent = state.ahead ? `${state.ahead} before this …` : `${state.step} …`;
      await wait(200);
      state = await call("GET", `api/jobs/${state.job}`);
    }
  } finally {
    page.job = null;
    $("cancel").hidden = true;
    $("progress").textContent = "";
  }
  if (state.result) for (const note of state.result.warnings || []) $("remarks").append(make("p", note, { class: "warning" }));
  if (state.status === "failed") throw new Error(state.error);
  if (state.status === "cancelled") $("progress").textContent = "Cancelled.";
  return state.status === "done" && page.study && page.study.study === study ? state.result : null;
}

async function cancel() {
  if (page.job) await call("DELETE", `api/jobs/${page.job}`).catch(() => {});
}

async function withoutButtons(buttons, action) {
  buttons.forEach((button) => (button.disabled = true));
  try {
    await action();
  } catch (error) {
    complain(error);
  }
  buttons.forEach((button) => (button.disabled = false));
}

function guarded(action) {
  // One thing at a time from one page.
  return async (event) => {
    if (event) event.preventDefault();
    const buttons = ["mark", "diagnose", "report", "compare"].map($).concat([...$("ask").querySelectorAll("button")]);
    if (page.job || buttons[0].disabled) return;
    await withoutButtons(buttons, action);
  };
}

async function ask() {
  const question = $("question").value.trim();
  if (!question) return;
  $("question").value = "";
  $("chat").append(make("p", question, { class: "asked" }));
  const said = make("p", "…", { class: "said" });
  $("chat").append(said);
  said.scrollIntoView({ block: "nearest" });
  try {
    const result = await work({ kind: "ask", question });
    said.textContent = result ? result.answer || "The model said nothing." : "Cancelled.";
    if (result && Object.keys(result.masks).length) await drawMasks();
  } catch (error) {
    said.textContent = "No answer.";
    throw error;
  }
}

async function mark() {
  const ticked = [...document.querySelectorAll(".ticks input:checked")].map((box) => box.value);
  const named = $("named").value.split(",").map((name) => name.trim()).filter(Boolean);
  const structures = [...new Set([...ticked, ...named])];
  if (!structures.length) throw new Error("Tick a structure or write its name first.");
  const result = await work({ kind: "segment", structures });
  if (!result) return;
  await drawMasks();
  for (const box of document.querySelectorAll(".ticks input:checked")) box.checked = false;
  $("named").value = "";
}

async function diagnose() {
  const result = await work({ kind: "diagnose", diseases: $("list").value });
  if (result) drawBars(result.diagnosis);
}

function drawBars(diagnosis) {
  const rows = Object.entries(diagnosis).sort((one, other) => other[1] - one[1]);
  $("bars").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = make("div", undefined, { class: "bar" });
      const meter = make("meter", undefined, { min: 0, max: 1, value, "aria-label": `${name}: ${Math.round(100 * value)} %` });
      row.append(make("span", name), meter, make("span", value.toFixed(2)));
      return row;
    }),
  );
}

async function report() {
  const result = await work({ kind: "report" });
  if (result) $("text").textContent = result.report || "The model wrote nothing.";
}

async function compare() {
  const result = await work({ kind: "findings" });
  if (!result) return;
  await drawMasks();
  showFindings(result);
}

function showFindings({ findings, fitness, report }) {
  if (fitness) $("fitness").textContent = `This scan is ${fitness.state === "unknown" ? "not compared: the model has no calibration" : fitness.state}. ${fitness.unusual.join("; ")}`;
  drawTable(findings);
  ground(report || "", findings);
}

async function restore() {
  // What the study was asked before, by this page or before a reload.
  const found = await call("GET", `api/studies/${page.study.study}/results`);
  for (const { question, answer } of found.answers) {
    $("chat").append(make("p", question, { class: "asked" }), make("p", answer || "The model said nothing.", { class: "said" }));
  }
  if (Object.keys(found.diagnosis).length) drawBars(found.diagnosis);
  if (found.report !== null) $("text").textContent = found.report || "The model wrote nothing.";
  if (Object.keys(found.findings).length) showFindings(found);
  if (Object.keys(found.masks).length) await drawMasks();
}

const anchor = (kind, name) => `${kind}-${name.replace(/\W+/g, "-")}`;

function lead(element, name, target) {
  // To the slice where the finding is largest, and to what else is said of it.
  element.classList.add("grounded");
  element.tabIndex = 0;
  element.setAttribute("role", "button");
  const act = () => {
    const mask = page.masks.get(name);
    if (mask && mask.told.voxels) goTo(mask);
    for (const other of document.querySelectorAll(".shown")) other.classList.remove("shown");
    for (const one of document.querySelectorAll(`[data-finding="${anchor(target, name)}"]`)) {
      one.classList.add("shown");
      one.scrollIntoView({ block: "nearest" });
    }
  };
  element.addEventListener("click", act);
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") act();
  });
}

function drawTable(rows) {
  const fine = ["consistent", "unchecked"];
  const table = make("table");
  const head = make("tr");
  for (const word of ["Finding", "Probability", "Report", "Asked", "Mask", "Agreement"]) head.append(make("th", word, { scope: "col" }));
  table.append(head);
  const wrong = (row) => !fine.includes(row.agreement);
  const sorted = Object.entries(rows).sort((one, other) => wrong(other[1]) - wrong(one[1]) || other[1].probability - one[1].probability);
  for (const [name, row] of sorted) {
    const line = make("tr", undefined, { "data-finding": anchor("row", name) });
    if (wrong(row)) line.className = "contradiction";
    const title = make("th", name, { scope: "row" });
    lead(title, name, "sentence");
    const mask = !row.mask ? "–" : row.mask.voxels ? `${row.mask.volume_ml.toFixed(1)} ml, ${Math.round(row.mask.diameter_mm)} mm` : "empty";
    const words = [(wrong(row) ? "contradiction: " : "") + row.agreement, ...row.remarks].join("; ");
    const probability = row.probability === null ? "–" : row.probability.toFixed(2);
    line.append(title, ...[probability, row.report, row.answer, mask, words].map((text) => make("td", text)));
    table.append(line);
  }
  $("table").replaceChildren(table);
}

function ground(text, rows) {
  // The report, whose sentences lead to the slice of what they state.
  const spans = new Map();
  for (const [name, row] of Object.entries(rows)) {
    for (const { start, end } of row.sentences) {
      if (!spans.has(start)) spans.set(start, { start, end, names: [] });
      spans.get(start).names.push(name);
    }
  }
  const characters = [...text]; // the server counts characters, not halves of pairs
  const parts = [];
  let done = 0;
  for (const { start, end, names } of [...spans.values()].sort((one, other) => one.start - other.start)) {
    if (start < done) continue;
    const sentence = make("span");
    for (const name of names) sentence.append(make("i", undefined, { "data-finding": anchor("sentence", name) }));
    sentence.append(characters.slice(start, end).join(""));
    const stated = names.find((name) => rows[name].report === "present" && rows[name].mask && rows[name].mask.voxels);
    if (stated) {
      lead(sentence, stated, "row");
      sentence.dataset.finding = anchor("sentence", stated);
    }
    parts.push(characters.slice(done, start).join(""), sentence);
    done = end;
  }
  $("text").replaceChildren(...parts, characters.slice(done).join(""));
}

// --- the start

async function start() {
  try {
    page.model = await call("GET", "api/model");
  } catch (error) {
    complain(error);
    return;
  }
  $("notice").textContent = page.model.notice;
  for (const name of Object.keys(page.model.windows)) $("window").append(make("option", name, { value: name }));
  $("window").value = "soft tissue";
  for (const name of Object.keys(page.model.disease_lists)) $("list").append(make("option", name.replaceAll("_", " "), { value: name }));
  for (const [id, names] of [["structures", page.model.structures], ["findings", page.model.findings]]) {
    for (const name of names) {
      const label = make("label");
      label.append(make("input", undefined, { type: "checkbox", value: name }), ` ${name}`);
      $(id).append(label);
    }
  }
  for (const id of ["files", "folder"]) {
    $(id).addEventListener("change", () => {
      openFiles($(id).files).then(() => ($(id).value = ""));
    });
  }
  $("sample").addEventListener("click", openSample);
  $("pacs").hidden = !page.model.pacs;
  $("pacs").addEventListener("submit", searchArchive);
  $("choose").addEventListener("submit", openSeries);
  $("other").addEventListener("click", closeStudy);
  $("cancel").addEventListener("click", cancel);
  startViewer();
  $("ask").addEventListener("submit", guarded(ask));
  $("mark").addEventListener("click", guarded(mark));
  $("diagnose").addEventListener("click", guarded(diagnose));
  $("report").addEventListener("click", guarded(report));
  $("compare").addEventListener("click", guarded(compare));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (!page.study && event.dataTransfer.files.length) openFiles(event.dataTransfer.files);
  });
  window.addEventListener("hashchange", reopen);
  await reopen();
  document.body.dataset.ready = "yes";
}

start();
