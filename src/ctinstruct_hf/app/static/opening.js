// Studies: sent, opened, several of them in tabs, closed.
"use strict";

const SENDING = 4; // files on their way at once

function send(path, file, arrived) {
  // A file as the body of a request; `arrived` is called with its bytes so far.
  return new Promise((done, fail) => {
    const request = new XMLHttpRequest();
    request.open("PUT", path);
    request.upload.addEventListener("progress", (event) => arrived(event.loaded));
    request.addEventListener("error", () => fail(new Error(NO_ANSWER)));
    request.addEventListener("load", () => {
      if (request.status < 300) return done();
      let error;
      try {
        ({ error } = JSON.parse(request.responseText));
      } catch {} // no JSON
      fail(new Error(error || `The server says ${request.status}.`));
    });
    request.send(file);
  });
}

const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MB`;

async function openFiles(files, title) {
  const list = [...files].filter((file) => !file.name.startsWith("."));
  if (!list.length) return;
  const folder = title || (list[0].webkitRelativePath || "").split("/")[0];
  const total = list.reduce((sum, file) => sum + file.size, 0);
  await opened(`Sending ${megabytes(total)} …`, async () => {
    if (total > page.model.upload_bytes) throw new Error("These files are larger than the server takes.");
    const { upload } = await call("POST", folder ? `api/uploads?title=${encodeURIComponent(folder)}` : "api/uploads");
    const sent = list.map(() => 0);
    const waiting = list.map((file, index) => [file, index]);
    const next = async () => {
      for (let item = waiting.shift(); item; item = waiting.shift()) {
        const [file, index] = item;
        await send(`api/uploads/${upload}?name=${encodeURIComponent(file.name)}`, file, (bytes) => {
          sent[index] = Math.min(bytes, file.size);
          const sum = sent.reduce((one, other) => one + other);
          $("sent").hidden = false;
          $("sent").value = total ? sum / total : 1;
          $("opening").textContent = `Sending ${megabytes(sum)} of ${megabytes(total)}`;
        });
      }
    };
    await Promise.all(Array.from({ length: SENDING }, next));
    await openUpload({ upload });
  });
}

async function opened(step, action) {
  // The opening of a study, with room for it.
  calm();
  $("choose").hidden = true;
  showOpening();
  if (!(await makeRoom())) return;
  $("opening").textContent = step;
  try {
    await action();
  } catch (error) {
    complain(error);
  }
  $("opening").textContent = "";
  $("sent").hidden = true;
}

async function openUpload(request) {
  $("opening").textContent = "Reading the scan …";
  const study = await call("POST", "api/studies", request);
  if (study.series) return listSeries(study, request);
  remember(study);
  return show(study);
}

function listSeries({ upload, series, skipped }, request) {
  const rows = series.map((one) => {
    const parts = [one.description || "without description", `${one.slices} slices`];
    if (one.number !== null) parts.unshift(`series ${one.number}`);
    if (one.spacing) parts.push(`${one.spacing.map((mm) => mm.toFixed(2)).join(" × ")} mm`);
    const row = make("li");
    const open = button("", () => opened("", () => openUpload({ ...request, upload, series: one.uid })), { "data-uid": one.uid });
    if (one.picture) open.append(make("img", undefined, { src: one.picture, alt: "" }));
    open.append(parts.join(", "));
    row.append(open);
    return row;
  });
  for (const { name, reason } of skipped) rows.push(make("li", `${name}: ${reason}`, { class: "skipped" }));
  $("series").replaceChildren(...rows);
  $("choose").hidden = false;
  $("series").querySelector("button").focus();
}

const openSample = () => {
  const sample = Math.floor(Math.random() * 1e6) + 1000000;
  return opened("Making a scan …", async () => openUpload({ sample }));
};

// --- the studies of this page, kept for a reload

const known = () => JSON.parse(sessionStorage.getItem("studies") || "[]");

function keep(studies) {
  sessionStorage.setItem("studies", JSON.stringify(studies));
  drawStudies();
}

function remember({ study, name }) {
  keep([...known().filter((one) => one.study !== study), { study, name: name || "made-up scan" }]);
}

function forget(study) {
  keep(known().filter((one) => one.study !== study));
}

function drawStudies() {
  const current = page.study && page.study.study;
  const items = known().flatMap(({ study, name }) => {
    const here = study === current && !$("study").hidden;
    const open = button(name, () => (study === current ? showStudy() : (location.hash = study)), here ? { "aria-current": "page" } : {});
    return [open, button("×", () => closeStudy(study, name), { "aria-label": `Close ${name}`, class: "close", ...(here ? { id: "close" } : {}) })];
  });
  $("studies").replaceChildren(...items, button("Open another", showOpening, { id: "other" }));
  $("studies").hidden = items.length === 0;
}

async function makeRoom() {
  // Whether the server has room for one more study; asks which to close where it has not.
  const studies = known();
  if (studies.length < page.model.studies) return true;
  const options = Object.fromEntries(studies.map(({ study, name }, index) => [study, `Close ${index + 1}: ${name}`]));
  const closed = await choice(`${studies.length} studies are open, which is as many as there may be. Which one is closed?`, { ...options, no: "None" });
  if (!closed || closed === "no") return false;
  await removeStudy(closed);
  return true;
}

function showOpening() {
  $("study").hidden = true;
  $("open").hidden = false;
  drawStudies();
}

function showStudy() {
  $("open").hidden = true;
  $("study").hidden = false;
  drawStudies();
}

async function show(study) {
  if (page.editing) stopEditing();
  page.study = study;
  page.masks.clear();
  for (const id of ["chat", "masks", "bars", "text", "table", "fitness", "warnings", "remarks", "sentences"]) $(id).replaceChildren();
  $("correct").hidden = true;
  clearMeasurements();
  delete $("canvas").dataset.ready;
  const notice = $("notice").textContent; // the model's own note stands there already
  for (const note of study.warnings.filter((one) => !notice.includes(one))) $("warnings").append(make("p", note, { class: "warning" }));
  const [depth, height, width] = study.shape;
  $("facts").textContent =
    `${study.name || "made-up scan"}: ${width} × ${height} × ${depth} voxels of ` +
    `${study.spacing[2]} × ${study.spacing[1]} × ${study.spacing[0]} mm`;
  showStudy();
  const base = `api/studies/${study.study}`;
  for (const [id, path] of [
    ["get-findings", "results/findings.json"], ["get-report", "results/report.txt"], ["get-page", "results/report.html"],
    ["get-seg", "results/masks.dcm"], ["get-corrected-text", "review/report.txt"], ["get-corrected-markdown", "review/report.md"],
    ["get-corrected-word", "review/report.docx"], ["get-corrected-json", "review/report.json"],
    ["get-corrections", "review/corrections.zip"],
  ]) {
    $(id).href = `${base}/${path}`;
    $(id).setAttribute("download", path.split("/")[1]);
  }
  $("seg-item").hidden = true;
  await draw(`${base}/scan.nii`);
  location.hash = study.study; // a reload finds it again
  await restore();
  $("canvas").dataset.ready = "yes";
}

async function restore() {
  // What the study was asked before, by this page or before a reload.
  const found = await call("GET", `api/studies/${page.study.study}/results`);
  for (const { question, answer } of found.answers) addTurn(question, answer || "The model said nothing.");
  if (Object.keys(found.diagnosis).length) drawBars(found.diagnosis);
  if (found.report !== null) showReport(found);
  page.labels = found.labels;
  if (Object.keys(found.findings).length) showFindings(found);
  if (Object.keys(found.masks).length) await drawMasks();
  if (found.job) guarded(() => follow(found.job).then(restoreAgain))();
}

async function restoreAgain() {
  // A job that a page before this one asked for has ended.
  if (page.study) {
    $("chat").replaceChildren();
    await restore();
  }
}

async function reopen() {
  // The study that the address names, as long as the server has it.
  const id = location.hash.slice(1);
  if (!id || (page.study && page.study.study === id)) return;
  try {
    const study = await call("GET", `api/studies/${encodeURIComponent(id)}`);
    if (!known().some((one) => one.study === id)) remember(study);
    await show(study);
  } catch (error) {
    forget(id);
    history.replaceState(null, "", location.pathname);
    complain(error);
  }
}

async function closeStudy(study, name) {
  if ((await choice(`Close ${name}? Its answers and masks are removed.`, { yes: "Close", no: "Keep" })) === "yes") await removeStudy(study);
}

async function removeStudy(study) {
  if (page.study && page.study.study === study) {
    history.replaceState(null, "", location.pathname);
    await cancel();
    page.study = null;
    showOpening();
  }
  forget(study);
  await call("DELETE", `api/studies/${study}`).catch(() => {});
}

async function dropped(event) {
  event.preventDefault();
  const items = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  const plain = [...event.dataTransfer.files];
  if (!plain.length) return;
  if (page.study && !$("study").hidden && (await choice("Open what was dropped beside this study?", { yes: "Open", no: "Cancel" })) !== "yes") return;
  const folder = items.length === 1 && items[0].isDirectory ? items[0].name : "";
  const files = items.length ? (await Promise.all(items.map(filesOf))).flat() : plain;
  await openFiles(files, folder);
}

async function filesOf(entry) {
  // The files of something dropped, at any depth.
  if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((done, fail) => reader.readEntries(done, fail)); // a hundred at a time
    if (!some.length) return (await Promise.all(found.map(filesOf))).flat();
    found.push(...some);
  }
}

async function startOpening() {
  for (const id of ["files", "folder"]) {
    $(id).addEventListener("change", () => {
      openFiles($(id).files).then(() => ($(id).value = ""));
    });
  }
  $("sample").addEventListener("click", openSample);
  $("pacs").hidden = !page.model.pacs;
  $("pacs").addEventListener("submit", searchArchive);
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => dropped(event).catch(complain));
  window.addEventListener("hashchange", reopen);
  drawStudies();
  await reopen();
}
