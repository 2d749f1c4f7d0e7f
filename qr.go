package main

import "github.com/skip2/go-qrcode"

// modulePixels is the width of a module in the PNG: whole, so that edges are sharp.
const modulePixels = 4

// qrPNG draws a QR code, level Medium, with the border of 4 white modules that
// scanners need. It fails when the text is too long, beyond some 2,300 bytes.
func qrPNG(text string) ([]byte, error) {
	q, err := qrcode.New(text, qrcode.Medium)
	if err != nil {
		return nil, err
	}
	return q.PNG(-modulePixels)
}

// qrText draws a QR code in half blocks, two modules a character high, to be
// scanned off a terminal: light on a dark ground, or with invert dark on light.
func qrText(invert bool) func(text string) ([]byte, error) {
	return func(text string) ([]byte, error) {
		q, err := qrcode.New(text, qrcode.Medium)
		if err != nil {
			return nil, err
		}
		return []byte(q.ToSmallString(invert)), nil
	}
}
