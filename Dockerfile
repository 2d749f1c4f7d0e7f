# docker build -t wxscan .
# docker run -p 8080:8080 --env-file wxscan.env wxscan
# In China: docker build --build-arg GOPROXY=https://goproxy.cn,direct -t wxscan .

FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
ARG GOPROXY
COPY go.mod go.sum ./
RUN go mod download
# .git is among it: the version comes from there.
COPY . .
ARG TARGETOS TARGETARCH TARGETVARIANT
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH GOARM=${TARGETVARIANT#v} \
    go build -buildvcs=true -trimpath -ldflags "-s -w" -o /wxscan .

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /src/LICENSE /LICENSE
COPY --from=build /wxscan /wxscan
# Nobody in particular; port 8080 needs no privilege.
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/wxscan"]
