package main

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// program returns the path of a program that a test needs. Without it the test
// is skipped, or fails where WXSCAN_E2E is set.
func program(t *testing.T, name, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	switch {
	case err == nil:
		return path
	case os.Getenv("WXSCAN_E2E") != "":
		t.Fatalf("%s is missing, and WXSCAN_E2E is set: apt-get install %s", name, debianPackage)
	default:
		t.Skipf("%s is missing: apt-get install %s", name, debianPackage)
	}
	return ""
}

func TestTheCodeHasWholeModulesABorderAndLevelLowHoweverItIsDrawn(t *testing.T) {
	const size = 4 + 29 + 4         // modules
	text := strings.Repeat("a", 50) // level L takes 29 modules for it, M 33
	svgDark := make(map[image.Point]bool)
	data, err := qrPNG(text)
	must(t, err)
	picture, err := png.Decode(bytes.NewReader(data))
	must(t, err)
	svg, err := qrSVG(text)
	must(t, err)
	for _, run := range regexp.MustCompile(`M(\d+) (\d+)h(\d+)v1h-(\d+)z`).FindAllStringSubmatch(string(svg), -1) {
		var x, y, wide int
		fmt.Sscan(strings.Join(run[1:4], " "), &x, &y, &wide)
		for i := range wide {
			svgDark[image.Pt(x+i, y)] = true
		}
	}
	light, err := qrText(text, false) // on a dark terminal
	must(t, err)
	dark, err := qrText(text, true)
	must(t, err)
	inText := func(drawn []byte, x, y int) bool { // a character is two modules high
		character := []rune(strings.Split(string(drawn), "\n")[y/2])[x]
		return strings.ContainsRune([]string{"█▀", "█▄"}[y%2], character)
	}
	if want := fmt.Sprintf(`viewBox="0 0 %d %d"`, size, size); !strings.Contains(string(svg), want) ||
		picture.Bounds() != image.Rect(0, 0, size*modulePixels, size*modulePixels) {
		t.Fatalf("PNG of %v, SVG %.200s, want %s", picture.Bounds(), svg, want)
	}
	for module := range size * size {
		x, y := module%size, module/size
		isDark := svgDark[image.Pt(x, y)]
		if isDark && min(x, y, size-1-x, size-1-y) < 4 {
			t.Fatalf("the border is dark at module %d, %d", x, y)
		}
		for pixel := range modulePixels * modulePixels {
			at := picture.At(x*modulePixels+pixel%modulePixels, y*modulePixels+pixel/modulePixels)
			if red, _, _, _ := at.RGBA(); (red == 0) != isDark {
				t.Fatalf("module %d, %d of the PNG is not as in the SVG", x, y)
			}
		}
		if inText(light, x, y) == isDark || inText(dark, x, y) != isDark {
			t.Fatalf("module %d, %d of the text is not as in the SVG", x, y)
		}
	}
	if _, err := qrPNG(strings.Repeat("a", 3000)); err == nil {
		t.Error("3000 bytes fit a QR code")
	}
}

// TestScannersReadThePicture has zbarimg read the code of both flows, on white and
// on black.
func TestScannersReadThePicture(t *testing.T) {
	zbarimg := program(t, "zbarimg", "zbar-tools")
	w := newWorld(t, "PUBLIC_URL=https://login.example.com")
	for _, begin := range []string{"getauthqr", "getloginqr"} {
		qr := w.begin(t, begin)
		picture, err := png.Decode(w.do("GET", "/wechat/qr.png?ticket="+url.QueryEscape(qr.Ticket), "").Body)
		must(t, err)
		for _, ground := range []color.Color{color.White, color.Black} {
			const margin = 50
			page := image.NewRGBA(picture.Bounds().Inset(-margin))
			draw.Draw(page, page.Bounds(), image.NewUniform(ground), image.Point{}, draw.Src)
			draw.Draw(page, picture.Bounds(), picture, image.Point{}, draw.Src)
			var encoded bytes.Buffer
			must(t, png.Encode(&encoded, page))
			file := filepath.Join(t.TempDir(), "qr.png")
			must(t, os.WriteFile(file, encoded.Bytes(), 0o600))
			got, err := exec.Command(zbarimg, "--quiet", "--raw", "-Sdisable", "-Sqrcode.enable", file).Output()
			if read := strings.TrimSuffix(string(got), "\n"); err != nil || read != qr.URL {
				t.Errorf("%s on %v: zbarimg reads %q, %v, want %q", begin, ground, read, err, qr.URL)
			}
		}
	}
}
