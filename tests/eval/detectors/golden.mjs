// Scores of the originals, by TensorFlow.js: nsfwjs' own classifier, and face-api's own networks.
//
// How golden.json was made, in a folder of its own:
//     npm install --ignore-scripts @tensorflow/tfjs@4.22.0 buffer@6.0.3 nsfwjs@4.4.0 @vladmandic/face-api@1.7.15
//     python tests/eval/detectors/golden.py FOLDER
//
// Reads {"pictures": {name: {width, height, rgb: base64}}} from stdin; writes scores by picture to stdout.
import { createRequire } from 'node:module';
import fs from 'node:fs';
import path from 'node:path';

const require = createRequire(path.join(process.cwd(), 'index.js'));
const log = console.log;
console.log = console.info = console.warn = () => {};
const tf = require('@tensorflow/tfjs');
const Module = require('node:module');
const load = Module._load;
// face-api asks for a faster backend; the plain one computes the same.
Module._load = (name, ...rest) => (name === '@tensorflow/tfjs-backend-wasm' ? {} : load(name, ...rest));
const faceapi = require('@vladmandic/face-api/dist/face-api.node-wasm.js');
const nsfw = require('nsfwjs');
await tf.setBackend('cpu');

const { pictures } = JSON.parse(fs.readFileSync(0, 'utf8'));
const weights = path.join(process.cwd(), 'node_modules/@vladmandic/face-api/model');
await faceapi.nets.tinyFaceDetector.loadFromDisk(weights);
await faceapi.nets.faceRecognitionNet.loadFromDisk(weights);
const classifier = await nsfw.load('MobileNetV2');

const found = {};
for (const [name, { width, height, rgb }] of Object.entries(pictures)) {
  const tensor = tf.tensor3d(new Uint8Array(Buffer.from(rgb, 'base64')), [height, width, 3], 'int32');
  const kinds = Object.fromEntries((await classifier.classify(tensor, 5)).map((row) => [row.className.toLowerCase(), row.probability]));
  const options = new faceapi.TinyFaceDetectorOptions({ inputSize: 416, scoreThreshold: 0.2 });
  const faces = await faceapi.nets.tinyFaceDetector.locateFaces(tensor, options);
  const boxes = faces.map((face) => [face.score, face.box.left, face.box.top, face.box.right, face.box.bottom]);
  const descriptor = await faceapi.nets.faceRecognitionNet.computeFaceDescriptor(tensor);
  found[name] = { nsfwjs: kinds, faces: boxes, descriptor: Array.from(descriptor) };
}
log(JSON.stringify(found));
