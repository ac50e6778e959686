// The page: opens a study, draws it by NiiVue, asks the server and shows what comes back.
"use strict";

const $ = (id) => document.getElementById(id);
const page = { model: null, study: null, upload: null, viewer: null, job: null, masks: new Map(), colours: 0 };

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
  page.colours = 0;
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
  $("canvas").dataset.ready = "yes";
}

async function closeStudy() {
  const study = page.study;
  await cancel();
  page.study = null;
  $("study").hidden = true;
  $("open").hidden = false;
  if (study) await call("DELETE", `api/studies/${study.study}`).catch(() => {});
}

// --- the viewer

async function draw(url) {
  if (!page.viewer) {
    page.viewer = new niivue.Niivue({
      isRadiologicalConvention: true, // the patient's right is on the left
      sagittalNoseLeft: true, // as in report.html
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 0.85, 0, 0.6],
      crosshairWidth: 1,
      crosshairWidthUnit: "mm",
      show3Dcrosshair: false,
      multiplanarShowRender: niivue.SHOW_RENDER ? niivue.SHOW_RENDER.NEVER : 0,
      dragAndDropEnabled: false,
      isColorbar: false,
      logLevel: "error",
    });
    await page.viewer.attachToCanvas($("canvas"));
    $("canvas").addEventListener("mousemove", hover);
  }
  const viewer = page.viewer;
  await viewer.loadVolumes([{ url, name: "scan.nii", colormap: "gray" }]);
  viewer.setSliceType(Number($("view").value));
  setWindow();
}

function setWindow() {
  const volume = page.viewer && page.viewer.volumes[0];
  if (!volume) return;
  [volume.cal_min, volume.cal_max] = page.model.windows[$("window").value];
  page.viewer.updateGLVolume();
}

function hover(event) {
  const viewer = page.viewer;
  if (!viewer.volumes.length) return;
  const scale = viewer.uiData?.dpr || window.devicePixelRatio || 1;
  const [x, y] = [event.offsetX * scale, event.offsetY * scale];
  const tile = viewer.tileIndex(x, y);
  const fraction = tile < 0 ? [-1] : viewer.screenXY2TextureFrac(x, y, tile, true);
  if (fraction[0] < 0) {
    $("hover").textContent = "–";
    return;
  }
  const volume = viewer.volumes[0];
  const voxel = viewer.frac2vox(fraction);
  const mm = viewer.frac2mm(fraction);
  const value = Math.round(volume.getValue(voxel[0], voxel[1], voxel[2]));
  const place = [["R", "L"], ["A", "P"], ["F", "H"]].map(([less, more], axis) => {
    const number = axis === 2 ? mm[2] : -mm[axis]; // the viewer counts to the right and to the front
    return `${Math.abs(number).toFixed(0)} ${number < 0 ? less : more}`;
  });
  $("hover").textContent = `${value} HU at ${place.join(", ")} mm`;
}

async function overlay(name, told) {
  const viewer = page.viewer;
  const before = page.masks.get(name);
  if (before) viewer.removeVolume(before.volume);
  const colour = before ? before.colour : page.model.colours[page.colours++ % page.model.colours.length];
  const parts = [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16));
  const map = "mask" + colour.slice(1);
  viewer.addColormap(map, { R: [0, parts[0]], G: [0, parts[1]], B: [0, parts[2]], A: [0, 255], I: [0, 255] });
  const url = `api/studies/${page.study.study}/masks/${encodeURIComponent(told.file)}`;
  const volume = await niivue.NVImage.loadFromUrl({
    url: `${url}?${Date.now()}`, name: "mask.nii.gz", colormap: map, opacity: Number($("opacity").value), cal_min: 0, cal_max: 1,
  });
  volume.cal_min = 0;
  volume.cal_max = 1;
  viewer.addVolume(volume);
  viewer.updateGLVolume();
  page.masks.set(name, { volume, colour, shown: true, told, url });
  listMasks();
}

function listMasks() {
  const rows = [...page.masks].map(([name, mask]) => {
    const row = make("li");
    const box = make("input", undefined, { type: "checkbox", "aria-label": `show ${name}` });
    box.checked = mask.shown;
    box.addEventListener("change", () => {
      mask.shown = box.checked;
      setOpacity();
    });
    const size = mask.told.voxels ? `${mask.told.volume_ml.toFixed(1)} ml, ${Math.round(mask.told.mean_hu)} HU` : "nothing found";
    const go = make("button", "Go to", { type: "button", "aria-label": `go to ${name}` });
    go.disabled = !mask.told.voxels;
    go.addEventListener("click", () => goTo(mask));
    row.append(
      box,
      make("span", undefined, { class: "swatch", style: `background:${mask.colour}` }),
      make("span", `${name}: ${size}`, { class: "grow" }),
      go,
      make("a", "NIfTI", { href: mask.url, download: mask.told.file, "aria-label": `download ${name} as NIfTI` }),
    );
    return row;
  });
  $("masks").replaceChildren(...rows);
  $("seg-item").hidden = !(page.study.dicom && rows.length);
}

function goTo(mask) {
  page.viewer.scene.crosshairPos = page.viewer.mm2frac(mask.told.place_mm);
  page.viewer.drawScene();
}

function setOpacity() {
  const viewer = page.viewer;
  for (const mask of page.masks.values()) {
    const place = viewer.volumes.indexOf(mask.volume);
    if (place > 0) viewer.setOpacity(place, mask.shown ? Number($("opacity").value) : 0);
  }
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

function guarded(action) {
  // One thing at a time from one page.
  return async (event) => {
    if (event) event.preventDefault();
    const buttons = ["mark", "diagnose", "report", "compare"].map($).concat([...$("ask").querySelectorAll("button")]);
    if (page.job || buttons[0].disabled) return;
    buttons.forEach((button) => (button.disabled = true));
    try {
      await action();
    } catch (error) {
      complain(error);
    }
    buttons.forEach((button) => (button.disabled = false));
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
    if (result) for (const [name, told] of Object.entries(result.masks)) await overlay(name, told);
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
  for (const [name, told] of Object.entries(result.masks)) await overlay(name, told);
  for (const box of document.querySelectorAll(".ticks input:checked")) box.checked = false;
  $("named").value = "";
}

async function diagnose() {
  const result = await work({ kind: "diagnose", diseases: $("list").value });
  if (!result) return;
  const rows = Object.entries(result.diagnosis).sort((one, other) => other[1] - one[1]);
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
  for (const [name, told] of Object.entries(result.masks)) await overlay(name, told);
  const fit = result.fitness;
  if (fit) $("fitness").textContent = `This scan is ${fit.state === "unknown" ? "not compared: the model has no calibration" : fit.state}. ${fit.unusual.join("; ")}`;
  drawTable(result.findings);
  ground(result.report || "", result.findings);
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
  $("view").addEventListener("change", () => page.viewer.setSliceType(Number($("view").value)));
  $("window").addEventListener("change", setWindow);
  $("opacity").addEventListener("input", setOpacity);
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
  window.addEventListener("pagehide", () => {
    if (page.study) fetch(`api/studies/${page.study.study}`, { method: "DELETE", keepalive: true });
  });
  document.body.dataset.ready = "yes";
}

start();
